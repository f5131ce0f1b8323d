"""`subcat submit CONFIG`: the main job as a Ray job of a running cluster: uploaded, followed, begun again if lost.

A lost driver (killed, or its node gone) is submitted again; the run goes on behind its last markers by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.runtime import ROOT
from jobs.config import ConfigError, load_experiment

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_POLL_S = 1.0
_LONGEST_SILENCE_S = 300.0
"""How long the job server may be away, say while its head is started again, before it is given up."""
_LOST = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")
"""Ray's names of the ways in which a job ends with its node, not by its own doing."""


def submit_command(
    config: Annotated[str, typer.Argument(help="TOML config: a path inside the clone, or an s3:// URI.")],
    address: Annotated[
        str | None, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster, http://host:8265.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as of subcat run.")] = None,
    stage: Annotated[str | None, typer.Option(help="Stop after the last occurrence of this stage.")] = None,
    max_resubmits: Annotated[int, typer.Option(min=0, help="How often a lost driver is started again.")] = 3,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages too.")] = False,
) -> None:
    """The main job on a running Ray cluster, its log followed; ends with the exit code of the job."""
    overrides = set_ or []
    load_experiment(config, overrides)  # a wrong config is told here, before anything is uploaded
    options = [part for override in overrides for part in ("--set", override)]
    options += (["--stage", stage] if stage else []) + (["--verbose"] if verbose else [])
    entrypoint = shlex.join(["python", "-m", "jobs", "run", _config_in_clone(config), *options])
    if not verbose:
        _quiet_client()
    code = follow_to_end(connect(address), entrypoint, upload_environment(), max_resubmits)
    if code:
        raise SystemExit(code)


def connect(address: str | None) -> JobSubmissionClient:
    """The job server at a dashboard's address. ValueError: an address of another kind; RuntimeError: none answers.

    Ray takes the token from RAY_AUTH_TOKEN or its file, where RAY_AUTH_MODE=token, as it starts in this process.
    """
    from ray.job_submission import JobSubmissionClient

    if not address:
        raise ValueError("no cluster named; give --address http://host:8265 (its dashboard), or RAY_API_SERVER_ADDRESS")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--address {address!r}: jobs go to the dashboard; give http://host:8265 (or https://)")
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # of requests, of Ray's versions, of tokens: each a class of its own
        raise RuntimeError(
            f"no job server to use at {address} ({_one_line(error)}); check the address, and that RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) hold the cluster's token"
        ) from error


def upload_environment(root: Path = ROOT) -> dict[str, Any]:
    """Ray's runtime environment: the clone as working_dir, and what infra/runtime-env.yaml says beside it."""
    import yaml  # comes with Ray

    return {**yaml.safe_load((root / "infra/runtime-env.yaml").read_text()), "working_dir": str(root)}


def follow_to_end(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any], max_resubmits: int) -> int:
    """Submit, print the log, submit again where the driver was lost; the exit code of the last job (130: Ctrl-C).

    Nothing is submitted again that failed by itself: exit codes 1 and 2, a broken environment, a job that was stopped.
    RuntimeError: the cluster takes no job, or no longer answers.
    """
    for attempt in range(max_resubmits + 1):
        job_id = _submit(client, entrypoint, environment, patient=attempt > 0)
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
        if details is not None and not is_lost(details):
            return _exit_code(details)
        reason = "the cluster was started anew and does not know it" if details is None else details.message
        typer.echo(f"job {job_id}: its driver was lost ({reason})", err=True)
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


async def _follow(client: JobSubmissionClient, job_id: str) -> JobDetails | None:
    """Print a job's log until the job has ended; None where the cluster no longer knows it.

    A broken connection is taken up again where it broke.
    """
    import aiohttp  # comes with Ray

    num_printed = 0
    answered_s = time.monotonic()
    while True:
        num_seen = 0
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):  # a node that is gone has no log
            async for text in client.tail_job_logs(job_id):
                fresh = text[max(num_printed - num_seen, 0) :]
                num_seen += len(text)
                num_printed = max(num_printed, num_seen)
                sys.stdout.write(fresh)
                sys.stdout.flush()
        try:
            details = client.get_job_info(job_id)
            answered_s = time.monotonic()
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError) as error:
            if f"{job_id} does not exist" in str(error):
                return None
            _check_silence(answered_s, error)
        await asyncio.sleep(_POLL_S)


def _submit(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any], patient: bool) -> str:
    """The new job's id; where patient, asked again and again while the job server is away. RuntimeError: it says no."""
    job_id = f"subcat_{secrets.token_hex(8)}"  # our own: asked twice, it is still one job
    started_s = time.monotonic()
    while True:
        try:
            # A copy: Ray puts the address of its upload into it, which does not outlive that cluster.
            return client.submit_job(entrypoint=entrypoint, runtime_env=dict(environment), submission_id=job_id)
        except RuntimeError as error:
            if f"{job_id} already exists" in str(error):
                return job_id
            raise RuntimeError(f"the cluster did not take the job: {_one_line(error)}") from error
        except OSError as error:  # of requests
            _check_silence(started_s if patient else -math.inf, error)
        time.sleep(_POLL_S)


def _check_silence(since_s: float, error: Exception) -> None:
    if time.monotonic() - since_s > _LONGEST_SILENCE_S:
        raise RuntimeError(f"the job server does not answer ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    """The line of an error that says most: Ray's are traces whose last line is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if len(lines) > 3 and "Traceback" in str(error) else lines[0] if lines else type(error).__name__


def _quiet_client() -> None:
    """Ray's client tells each file that it leaves out, several times."""
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk

    for name in (dashboard_sdk.__name__, sdk.__name__, "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _exit_code(details: JobDetails) -> int:
    if details.status.value == "SUCCEEDED":
        return 0
    told = (details.message or "").split(", last available logs")[0].splitlines()  # the log has been printed
    typer.echo(f"job {details.submission_id} {details.status.value.lower()}: {told[0] if told else ''}", err=True)
    return details.driver_exit_code or 1


def _config_in_clone(config: str) -> str:
    """The config's path as seen from the uploaded clone."""
    if "://" in config:
        return config
    path = Path(config).resolve()
    if not path.is_relative_to(ROOT):
        raise ConfigError(f"{config} lies outside the clone {ROOT}, which is what is uploaded; copy it into configs/")
    return path.relative_to(ROOT).as_posix()
