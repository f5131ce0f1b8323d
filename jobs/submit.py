"""`subcat submit CONFIG`: the main job as a Ray job of a running cluster: uploaded, followed, begun again if lost.

A lost driver (killed, or its node gone) is submitted again; the run goes on behind its last markers by itself.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.runtime import ROOT
from cluster.tracking import TrackingSettings
from jobs.config import ConfigError, load_experiment

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_POLL_S = 1.0
_LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""Ray's names of the ways in which a job ends with its node, not by its own doing."""


def submit_command(
    config: Annotated[str, typer.Argument(help="TOML config: a path inside the clone, or an s3:// URI.")],
    address: Annotated[
        str | None, typer.Option(help="Dashboard of the cluster, http://host:8265; default: RAY_API_SERVER_ADDRESS.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as of subcat run.")] = None,
    max_resubmits: Annotated[int, typer.Option(min=0, help="How often a lost driver is started again.")] = 3,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages too.")] = False,
) -> None:
    """The main job on a running Ray cluster; ends with the exit code of the job."""
    overrides = set_ or []
    experiment = load_experiment(config, overrides)  # a wrong config is told here, before anything is uploaded
    options = [part for override in overrides for part in ("--set", override)] + (["--verbose"] if verbose else [])
    entrypoint = shlex.join(["python", "-m", "jobs", "run", _config_in_clone(config), *options])
    client = connect(address)
    typer.echo(f"MLflow: {tracking_place(experiment.tracking, experiment.output)}")
    code = follow_to_end(client, entrypoint, upload_environment(), max_resubmits)
    if code:
        raise SystemExit(code)


def connect(address: str | None) -> JobSubmissionClient:
    """The job server at a dashboard's address. ValueError: an address of another kind; RuntimeError: none answers."""
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ValueError("no cluster named; give --address http://host:8265 (its dashboard), or RAY_API_SERVER_ADDRESS")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address!r}: jobs go to the dashboard; give http://host:8265 (or https://)")
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # of requests, of Ray's versions, of tokens: each a class of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"no job server to use at {address} ({reason}); check the address, and that RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) hold the cluster's token"
        ) from error


def upload_environment(root: Path = ROOT) -> dict[str, Any]:
    """Ray's runtime environment: the clone as working_dir, and what infra/runtime-env.yaml says beside it."""
    import yaml  # comes with Ray

    return {**yaml.safe_load((root / "infra/runtime-env.yaml").read_text()), "working_dir": str(root)}


def tracking_place(settings: TrackingSettings, output: str) -> str:
    """Where the run's MLflow is, in words."""
    if not settings.enabled:
        return "off (tracking.enabled = false)"
    told = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return told or f"none named (tracking.uri); the job keeps a database beside {output} on the node it runs on"


def follow_to_end(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any], max_resubmits: int) -> int:
    """Submit, print the log, submit again where the driver was lost; the exit code of the last job (130: Ctrl-C).

    Nothing is submitted again that failed by itself: exit codes 1 and 2, a broken environment, a job that was stopped.
    """
    for attempt in range(max_resubmits + 1):
        try:
            job_id = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            raise RuntimeError(f"the cluster did not take the job: {str(error).strip().splitlines()[-1]}") from error
        typer.echo(f"job {job_id} (submission {attempt + 1} of at most {max_resubmits + 1}): {entrypoint}")
        try:
            details = asyncio.run(_follow(client, job_id))
        except KeyboardInterrupt:
            typer.echo(
                f"\nno longer following; the job goes on. Attach: ray job logs --follow {job_id}. "
                f"Stop it: ray job stop {job_id}",
                err=True,
            )
            return 130
        if not is_lost(details):
            return _exit_code(details)
        typer.echo(f"job {job_id}: its driver was lost ({details.message})", err=True)
    typer.echo(f"given up after {max_resubmits + 1} submissions (--max-resubmits); run the same to go on", err=True)
    return 1


def is_lost(details: JobDetails) -> bool:
    """Whether the driver died of a signal or with its node, rather than ended."""
    if details.status.value != "FAILED":
        return False
    code = details.driver_exit_code
    if code is None:
        return details.error_type in _LOST
    return code < 0 or code > 128  # a shell reports signal n as 128 + n


async def _follow(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Print a job's log until the job has ended; a broken connection is taken up again where it broke."""
    num_printed = 0
    num_failures = 0
    while True:
        try:
            num_seen = 0
            async for text in client.tail_job_logs(job_id):
                fresh = text[max(num_printed - num_seen, 0) :]
                num_seen += len(text)
                num_printed = max(num_printed, num_seen)
                sys.stdout.write(fresh)
                sys.stdout.flush()
            details = client.get_job_info(job_id)
            num_failures = 0
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError) as error:  # of aiohttp and requests: OSError
            num_failures += 1
            if num_failures > 60:
                raise RuntimeError(f"job {job_id}: the job server no longer answers ({error})") from error
        await asyncio.sleep(_POLL_S)


def _exit_code(details: JobDetails) -> int:
    if details.status.value == "SUCCEEDED":
        return 0
    typer.echo(f"job {details.submission_id} {details.status.value.lower()}: {details.message}", err=True)
    return details.driver_exit_code or 1


def _config_in_clone(config: str) -> str:
    """The config's path as seen from the uploaded clone."""
    if "://" in config:
        return config
    path = Path(config).resolve()
    if not path.is_relative_to(ROOT):
        raise ConfigError(f"{config} lies outside the clone {ROOT}, which is what is uploaded; copy it into configs/")
    return path.relative_to(ROOT).as_posix()
