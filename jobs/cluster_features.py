"""Cluster the features inside each parent class; the clusters are the sub-categories of the next round.

Reads:   features of the same round
Writes:  rounds/RR/subcategories: part-*.parquet of image_id, labels, cluster_ids, distances; centroids.parquet;
         result.json
Runs on: faiss Ray actors that Ray Data feeds from the shards; in process with stream.num_actors = 0
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.artifacts import Artifact
from cluster.feature_shards import cluster_features
from cluster.image_reading import BadRow
from cluster.tracking import ChildRun
from jobs.context import StageContext, complete, round_folder
from jobs.manifest import Manifest
from jobs.soft_targets import CENTROIDS, centroid_table


def run(context: StageContext, manifest: Manifest, round_index: int, features: Artifact) -> Artifact:
    """Sub-categories of this round; settings: experiment.kmeans (subcat_core.kmeans.KMeansSettings)."""
    experiment = context.experiment
    settings = experiment.kmeans
    num_classes = manifest.classes.num_classes

    def work(artifact: Artifact, child: ChildRun) -> dict[str, Any]:
        with context.progress.stage(
            f"cluster features, round {round_index}", total=settings.max_passes, unit="passes"
        ) as bar:

            def on_pass(pass_index: int, inertia: float, num_changed: int) -> None:
                bar.advance(1)
                values = {"cluster_features/pass_inertia": inertia, "cluster_features/num_changed": float(num_changed)}
                child.log_metrics(values, pass_index)

            result = cluster_features(
                features.folder,
                manifest.shard_names("train"),
                artifact.folder,
                num_classes=num_classes,
                settings=settings,
                stream=experiment.stream,
                rng_seed=experiment.rng_seed,
                on_pass=on_pass,
                num_clusters=settings.clusters_of(manifest.classes.names),
            )
        artifact.folder.write_table(CENTROIDS, centroid_table(result.centroids))
        counts = np.asarray(result.counts)
        artifact.folder.write_json(
            "result.json",
            {
                "num_clusters": settings.num_clusters,
                "inertia": [float(value) for value in result.inertia],
                "counts": counts.tolist(),
                "balance": [float(value) for value in result.balance],
                "num_passes": result.num_passes,
                "converged": result.converged,
            },
        )
        if not result.converged:
            context.progress.note(
                f"cluster features, round {round_index}: rows still changed after kmeans.max_passes = "
                f"{settings.max_passes}; raise it for a lower inertia"
            )
        for index, name in enumerate(manifest.classes.names):
            child.log_metrics(
                {
                    f"cluster_features/inertia_{name}": float(result.inertia[index]),
                    f"cluster_features/balance_{name}": float(result.balance[index]),
                }
            )
            for cluster_id, size in enumerate(counts[index]):  # a step a cluster: a chart of the sizes
                child.log_metrics({f"cluster_features/size_{name}": float(size)}, cluster_id)
        return {
            "num_images": manifest.num_rows("train"),
            "num_pairs": int(counts.sum()),
            "converged": result.converged,
            "num_passes": result.num_passes,
            "inertia": float(np.sum(result.inertia)),
            "balance": float(np.mean(result.balance)),
            "num_empty": int((counts == 0).sum()),
            "peak_rss_bytes": result.peak_rss_bytes,
            "num_bad": len(result.bad_rows),
            "bad": [
                BadRow(image_id, features.folder.uri(f"{name}.parquet"), "feature is not finite")
                for name, image_id in result.bad_rows
            ],
        }

    return complete(
        context,
        name=round_folder(round_index, "subcategories"),
        stage="cluster_features",
        round_index=round_index,
        inputs={
            "settings": settings.decides(),
            "rng_seed": experiment.rng_seed,
            "features": features.output_fingerprint,
        },
        work=work,
    )
