"""Where a run of an MLflow server wrote its output: from a run's id or name to its folder, for comparing runs."""

from __future__ import annotations

from cluster.tracking_client import quiet_mlflow, safe_text

_MAX_NAMED = 5
_TIMEOUT_S = 30


def output_of_run(uri: str, run: str) -> str:
    """The output folder of a parent run by its id or its name, from the tag that Tracker gives it.

    uri: of the server or database. Raises ValueError where there is no such run, several, or none of this program's;
    RuntimeError where the server does not answer.
    """
    mlflow = quiet_mlflow(_TIMEOUT_S)
    where = safe_text(uri)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiments = [found.experiment_id for found in client.search_experiments()]
        quoted = run.replace("'", "\\'")
        found = client.search_runs(experiments, f"attributes.run_id = '{quoted}'")
        found = found or client.search_runs(
            experiments, f"attributes.run_name = '{quoted}'", order_by=["start_time DESC"]
        )
    except Exception as error:
        raise RuntimeError(f"MLflow at {where} cannot be searched: {safe_text(str(error))}") from error
    parents = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    if not parents:
        raise ValueError(f"{run}: neither the output folder of a run nor the id or name of a parent run in {where}")
    if len(parents) > 1:
        shown = "; ".join(f"{one.info.run_id} in {one.data.tags.get('output')}" for one in parents[:_MAX_NAMED])
        raise ValueError(f"{run}: {len(parents)} MLflow runs have this name; give an id or a folder ({shown})")
    output = parents[0].data.tags.get("output")
    if not output:
        raise ValueError(f"{run}: this MLflow run has no tag `output`, so `subcat run` did not make it")
    return str(output)
