"""Ray for one run: a local cluster or an existing one, quiet, authenticated, its workers able to import this clone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
from pydantic import Field

from cluster.placement import WAIT_S, waiting_for_nodes
from cluster.storage import Storage
from subcat_core.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("subcat_core", "cluster", "jobs")
_NEEDLESS = "PYTHON worker processes have been started"  # advice for clusters, told of the few of a small machine
_SPARE_CPUS = 4  # logical: actors never hold them all, or Ray Data's and Ray Train's own tasks starve
_QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what the C++ half tells on stderr also comes as Python errors, where it matters
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "WARNING",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
}


class ClusterSettings(Settings):
    """Where Ray runs, and how much of this machine a local cluster takes."""

    address: str | None = None
    """An existing cluster: "auto" or "host:6379". None starts one on this machine, unless RAY_ADDRESS names another."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; None: the cores (at least 4) and 4 spare ones."""
    num_gpus: int | None = Field(default=None, ge=0)
    """GPUs of a local cluster; None: those found."""
    object_store_bytes: int | None = Field(default=None, ge=78_643_200)
    """Shared memory of a local cluster; None: Ray's own choice."""
    shared_folder: bool = False
    """Every node mounts the output folder (NFS or the like), so a local path will do on several nodes."""
    wait_for_resources_s: float = Field(default=WAIT_S, ge=0)
    """How long a stage waits for nodes that hold its actors or workers before it ends with an error, on a cluster that
    is joined. While an autoscaler says that machines are coming the time does not run."""
    threads_per_worker: int = Field(default=1, ge=1)
    """OpenMP, BLAS and numba threads of one worker process."""


@contextlib.contextmanager
def start_ray(settings: ClusterSettings, *, verbose: bool = False) -> Iterator[None]:
    """Run the block with Ray; afterwards a cluster that was started here is stopped, and one joined is left.

    A Ray that this process has already is used as it is. verbose: show what Ray and its workers print. ValueError
    for ray:// addresses and for resources given beside an address; RuntimeError where no cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or None
    _check(settings, address)
    local = address in (None, "local")
    variables = worker_environment(settings.threads_per_worker)
    with _environment({**({} if verbose else _QUIET), **(variables if local else {})}):
        if local:
            _ensure_token()
        _init(settings, None if local else address, variables, verbose)
        _configure_data(verbose)
    try:
        with waiting_for_nodes(0.0 if local else settings.wait_for_resources_s):  # a local cluster gets no more nodes
            yield
    finally:
        ray.shutdown()


def quiet_libraries(verbose: bool = False) -> None:
    """For programs, not for libraries: hide the deprecation and future warnings of what we build on, unless verbose."""
    if not verbose:
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)


def worker_environment(num_threads: int = 1) -> dict[str, str]:
    """Environment variables of worker processes.

    First-touch memory is slow on virtual machines, so glibc keeps what it has got (docs/performance.md); oneDNN keeps
    kernels for few image sizes, or a stream of many sizes grows; an actor that has booked no GPU sees none; PYTHONPATH
    names this clone, so that workers import it wherever the driver was started.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "8589934592",
        "MALLOC_TOP_PAD_": "268435456",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        **{name: str(num_threads) for name in threads},
        "PYTHONPATH": path,
    }


def peak_rss_bytes() -> int:
    """The most memory this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_resources() -> dict[str, float]:
    """num_cpus, num_gpus and num_nodes of the cluster, whether in use or not; of this machine without Ray."""
    if not ray.is_initialized():
        return {"num_cpus": float(_num_cores()), "num_gpus": 0.0, "num_nodes": 1.0}
    total = ray.cluster_resources()
    num_nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return {"num_cpus": total.get("CPU", 0.0), "num_gpus": total.get("GPU", 0.0), "num_nodes": float(num_nodes)}


def check_shared_storage(storage: Storage, shared_folder: bool = False) -> None:
    """ValueError where a cluster of several nodes would write to a folder that only one of them sees.

    shared_folder: the user says that every node mounts the folder (NFS or the like).
    """
    num_nodes = int(available_resources()["num_nodes"])
    if num_nodes > 1 and storage.is_local and not shared_folder:
        raise ValueError(
            f"storage {storage.root} is a local path, and the cluster has {num_nodes} nodes; give an s3:// root, or "
            "say that every node mounts this path (cluster.shared_folder = true)"
        )


def _check(settings: ClusterSettings, address: str | None) -> None:
    if address and address.startswith("ray://"):
        raise ValueError(
            f"cluster address {address!r} is of the Ray Client, over which Ray Data is not safe (ray#47759); "
            "submit the job instead: ray job submit --working-dir . -- python -m jobs run CONFIG"
        )
    given = [n for n in ("num_cpus", "num_gpus", "object_store_bytes") if getattr(settings, n) is not None]
    if address not in (None, "local") and given:
        raise ValueError(
            f"{', '.join(given)} is of a cluster started here, and address {address!r} names one that runs; drop either"
        )


def _init(settings: ClusterSettings, address: str | None, variables: Mapping[str, str], verbose: bool) -> None:
    level = logging.INFO if verbose else logging.ERROR
    if not verbose:
        with contextlib.suppress(ImportError, AttributeError):  # not public; without it a line too many is shown
            ray._private.ray_logging.stdout_deduplicator.skip_re = re.compile(_NEEDLESS)
    logging.getLogger("ray._private.authentication").setLevel(level)  # it announces its default at each start
    if address is None:
        num_cpus = settings.num_cpus or max(_num_cores(), 4) + _SPARE_CPUS
        with contextlib.nullcontext() if verbose else _stderr_held():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=settings.num_gpus,
                object_store_memory=settings.object_store_bytes,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
            )
        return
    try:
        with contextlib.nullcontext() if verbose else _stderr_held():
            ray.init(
                address=address,
                runtime_env=_runtime_env(variables),
                log_to_driver=verbose,
                logging_level=level,
            )
    except ConnectionError as error:
        raise RuntimeError(
            f"no Ray cluster answers at address {address!r} ({str(error).splitlines()[0]}); start one, or leave the "
            "address out to run on this machine"
        ) from error


def _runtime_env(variables: Mapping[str, str]) -> dict[str, object]:
    """What workers of a running cluster get: variables and the three packages, unless the job brought them."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    wanted = {name: value for name, value in variables.items() if name != "PYTHONPATH" and name not in os.environ}
    return {"env_vars": wanted} if in_job else {"env_vars": wanted, "py_modules": [str(ROOT / p) for p in _PACKAGES]}


def _ensure_token() -> None:
    """Have a token before a local cluster starts: Ray's own file, made readable by its owner alone, or in memory.

    Ray would make the file too, but readable by everyone, and two runs that start at once would overwrite each other's.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    if path.exists():
        return
    token = secrets.token_hex(32)
    temporary = path.with_name(f"auth_token.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode=0o600)
        temporary.write_text(token)
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)  # unlike a rename, this leaves another run's token alone
        temporary.unlink()
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = token  # no home to write to: the processes started from here inherit it


def _configure_data(verbose: bool) -> None:
    from ray.data import DataContext

    if not verbose:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.issue_detectors_config.detectors = []  # pages of advice on memory, every half minute
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        # A trace of a hundred lines, beside the error that reaches the caller anyway.
        logging.getLogger("ray.data._internal.execution.streaming_executor_state").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _stderr_held() -> Iterator[None]:
    """Keep what the C++ half of Ray writes to file descriptor 2 at its start; show it only where the start fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the block, and so for processes started in it; what the user has set stays."""
    added = {name: value for name, value in variables.items() if name not in os.environ or name == "PYTHONPATH"}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
