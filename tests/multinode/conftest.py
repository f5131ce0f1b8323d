"""The cluster that all scenarios share: three nodes, an S3 server, MLflow on PostgreSQL; what is started ends here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime import ROOT
from tests.conftest import S3_BUCKET
from tests.jobs.conftest import draw_tiny
from tests.multinode.network import Network
from tests.multinode.nodes import BIN, Cluster, Job
from tests.multinode.servers import Server, mlflow_server, postgres_programs, postgres_server, s3_environment, s3_server

TOKEN = "c" * 64
LONGEST_RUN_S = 3000.0  # two minutes where nothing else runs
SIDE_PX = 224  # of the pictures: networks see 48 pixels, the CRF sees all, so that masks take a while
NUM_MASKS = 12


@dataclasses.dataclass
class Lab:
    """All machines and servers, the bucket as a folder, and how jobs are submitted."""

    cluster: Cluster
    network: Network
    s3: Server
    mlflow: Server
    bucket: Path
    folder: Path
    environment: dict[str, str]
    """Of a client and of every node: the token, the keys of the bucket."""

    def submit(self, name: str, *, by_subcat: bool = False) -> Job:
        """The job that writes s3://BUCKET/name, submitted by `ray job submit` or by `subcat submit`."""
        options = [part for setting in self.settings(name) for part in ("--set", setting)]
        address = ["--address", self.cluster.head.dashboard]
        if by_subcat:
            command = [sys.executable, "-m", "jobs", "submit", "configs/demo.toml", *address, *options]
        else:
            command = [str(BIN / "ray"), "job", "submit", *address, "--working-dir", "."]
            command += ["--runtime-env", "infra/runtime-env.yaml", "--"]
            command += ["python", "-m", "jobs", "run", "configs/demo.toml", *options]
        return Job(command, ROOT, self.folder / f"{name}.log", self.environment)

    def run_here(self, name: str) -> Job:
        """The same without the cluster: a Ray of its own on this machine."""
        local = ["cluster.address=local", "cluster.num_cpus=6", "cluster.object_store_bytes=80000000"]
        options = [part for setting in [*self.settings(name), *local] for part in ("--set", setting)]
        command = [sys.executable, "-m", "jobs", "run", "configs/demo.toml", *options]
        return Job(command, ROOT, self.folder / f"{name}.log", self.environment)

    def settings(self, name: str) -> list[str]:
        """configs/demo.toml made as small as it goes: 16 pictures, a small network, one picture a shard."""
        network = '{name="timm:mobilenetv2_050", weights="none", output_stride=16}'
        augment = "{resize_min_px=48, resize_max_px=48, crop_px=48}"
        compute = "{num_workers=1, num_decode_workers=0, threads_per_worker=1, cpus_per_worker=1}"
        optimiser = "{{epochs={}, batch_size=4, learning_rate=0.01, freeze_batch_norm=false}}"
        return [
            f"output=s3://{S3_BUCKET}/{name}",
            "name=multinode",
            "rounds=1",
            f"prepare.source.path=s3://{S3_BUCKET}/data/labels.csv",
            "prepare.rows_per_shard=1",
            f"classifier.backbone={network}",
            f"classifier.augment={augment}",
            f"classifier.optimiser={optimiser.format(4)}",
            f"classifier.compute={compute}",
            "features.base_px=48",
            "kmeans.num_clusters=2",
            "kmeans.num_restarts=2",
            "cams.cam.base_px=48",
            f'segmenter.model={{architecture="deeplabv2", backbone={network}}}',
            f"segmenter.augment={augment}",
            f"segmenter.optimiser={optimiser.format(12)}",
            f"segmenter.compute={compute}",
            "stream.cpus_per_actor=2.0",  # more than half a node: two actors are on two nodes
            f"tracking.uri={self.mlflow.url}",
        ]

    def output(self, name: str) -> Path:
        return self.bucket / name

    def masks(self, name: str) -> dict[str, bytes]:
        """File -> bytes of every pseudo mask and predicted mask."""
        root = self.output(name)
        files = [*root.glob("pseudo_masks/png/*.png"), *root.glob("predictions/png/*.png")]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}

    def copy_before(self, name: str, source: str, stages: tuple[str, ...]) -> None:
        """An output that stands where `source` stood before these folders were written, with no MLflow run yet."""
        leave = shutil.ignore_patterns("report", "tracking.json", *stages)
        shutil.copytree(self.output(source), self.output(name), ignore=leave)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Head, two workers and servers; skipped where PostgreSQL is not installed."""
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="subcat"))
    folder.chmod(0o711)  # the database's user passes through
    with contextlib.ExitStack() as ends:
        ends.callback(shutil.rmtree, folder, ignore_errors=True)
        network = Network()
        ends.callback(network.close)
        if not network.apart:
            print("no network namespaces here: all nodes share 127.0.0.1 and are told apart by their ports")
        s3 = s3_server(network.host, folder / "s3", folder / "s3.log")
        database = postgres_server(folder / "postgres", folder / "postgres.log")
        mlflow = mlflow_server(
            network.host, database, f"s3://{S3_BUCKET}/mlflow", folder / "mlflow.log", s3_environment(s3)
        )
        for server in (s3, database, mlflow):
            ends.callback(server.stop)
            server.start()
        bucket = folder / "s3" / S3_BUCKET
        draw_tiny(bucket / "data", side=SIDE_PX)
        environment = _environment() | s3_environment(s3)
        cluster = Cluster(network, folder, environment)
        ends.callback(cluster.close)
        yield Lab(cluster, network, s3, mlflow, bucket, folder, environment)


@pytest.fixture(scope="session")
def single_node(lab: Lab) -> str:
    """Name of a run on one machine, without the cluster: what every scenario must come to."""
    job = lab.run_here("single")
    try:
        code, seconds = job.finish(LONGEST_RUN_S)
    finally:
        job.close()
    assert code == 0, job.told()[-4000:]
    print(f"single node: {seconds:.0f} s")
    assert len(lab.masks("single")) == NUM_MASKS + 4
    return "single"


def _environment() -> dict[str, str]:
    """This machine's, without what would lead a client elsewhere; `python` is the one with the dependencies."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_", "PYTHON"))
    }
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }
