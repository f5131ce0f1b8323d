"""The command line: demo, prepare, validate, run, predict, submission, submit, evaluate, report, results, compare.

Exit codes: 0 done; 1 the run failed (storage, lost workers); 2 the input or the config is wrong, or an output is of
other inputs.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.artifacts import ArtifactMismatch
from cluster.progress import Progress
from cluster.runtime import ClusterSettings, check_shared_storage, quiet_libraries
from cluster.storage import Storage, StorageError
from cluster.streams import StreamSettings
from jobs import compare, demo_dataset, evaluate, pipeline, predict, report, results, submission, submit, summary
from jobs.config import ConfigError, load_experiment
from jobs.dry_run import parse_assumptions, print_dry_run
from jobs.execution import execute, with_ray
from jobs.importers import list_images
from jobs.manifest import open_manifest
from jobs.prepare import PrepareSettings
from jobs.quarantine import told
from jobs.validate import format_problems, validate

app = typer.Typer(
    name="subcat",
    help="Tags in, masks and a segmenter out: weakly-supervised segmentation by sub-category exploration, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[str, typer.Argument(help="TOML config, a path or an s3:// URI.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: --set classifier.optimiser.epochs=4")
]
TilePx = Annotated[int | None, typer.Option(help="Cut images into tiles of this side: prepare.tiles.tile_px.")]
StridePx = Annotated[int | None, typer.Option(help="Pixels between tiles: prepare.tiles.stride_px.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages, and whole traces of errors.")]


def main() -> None:
    """Run a command; errors that a user can mend are one clear message, not a trace."""
    verbose = "--verbose" in sys.argv
    quiet_libraries(verbose)
    try:
        app(standalone_mode=False)
    except (ConfigError, ArtifactMismatch, StorageError, ValueError, typer.TyperException) as error:
        _fail(error, verbose, code=1 if isinstance(error, StorageError) else 2)
    except RuntimeError as error:
        _fail(error, verbose, code=1)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; run the same command again to go on", err=True)
        raise SystemExit(130) from None


def _fail(error: Exception, verbose: bool, code: int) -> None:
    if verbose:
        traceback.print_exception(error)
    logging.getLogger("subcat").debug("failed", exc_info=error)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    typer.secho(f"error: {message}", err=True, fg=typer.colors.RED)
    raise SystemExit(code) from error


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix for everything the run writes.")] = "outputs/demo",
    data: Annotated[Path, typer.Option(help="Folder for the procedural pictures.")] = Path("data/demo"),
    set_: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """The main job on the embedded pictures: manifest to report, two rounds after round 0."""
    demo_dataset.write_demo_dataset(data)
    config = Path(__file__).resolve().parent.parent / "configs" / "demo.toml"
    table = json.dumps(str(data.absolute() / "labels.csv"))
    overrides = [f"output={json.dumps(output)}", f"prepare.source.path={table}", *(set_ or [])]
    execute(load_experiment(str(config), overrides), verbose=verbose, command=_command())


@app.command()
def run(
    config: Config,
    set_: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Stop after the last occurrence of this stage.")] = None,
    tile_px: TilePx = None,
    stride_px: StridePx = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the stages, their expected cost and the settings, and exit.")
    ] = False,
    num_train: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: images of split train, where the lists are elsewhere.")
    ] = None,
    num_val: Annotated[int | None, typer.Option(min=0, help="With --dry-run: images of split val.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="With --dry-run: 10^12 operations a second that a GPU sustains.")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="With --dry-run: another assumption, --assume labels_per_image=2.9")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """The main job: every stage of a config, complete ones skipped."""
    experiment = load_experiment(config, _with_tiles(set_, tile_px, stride_px))
    if stage is not None and stage not in pipeline.STAGES:
        raise ConfigError(f"--stage {stage}: no such stage; one of {', '.join(pipeline.STAGES)}")
    assumptions = parse_assumptions(num_train, num_val, tflops, assume or [])
    if dry_run:
        print_dry_run(experiment, assumptions)
        return
    if assumptions.model_fields_set:
        raise ConfigError(
            f"{', '.join(sorted(assumptions.model_fields_set))}: only --dry-run assumes something; add it"
        )
    execute(experiment, last_stage=stage, verbose=verbose, command=_command())


@app.command()
def prepare(
    config: Config,
    set_: Overrides = None,
    tile_px: TilePx = None,
    stride_px: StridePx = None,
    verbose: Verbose = False,
) -> None:
    """Import and check images and tags, and cut images into tiles where asked for: the manifest alone."""
    experiment = load_experiment(config, _with_tiles(set_, tile_px, stride_px))
    last_stage = "prepare" if experiment.prepare.tiles is None else "cut_tiles"
    execute(experiment, last_stage=last_stage, verbose=verbose, command=_command())


def _with_tiles(overrides: list[str] | None, tile_px: int | None, stride_px: int | None) -> list[str]:
    """The overrides that --tile-px and --stride-px are short for, and the others."""
    given = {"tile_px": tile_px, "stride_px": stride_px}
    tiles = [f"prepare.tiles.{key}={value}" for key, value in given.items() if value is not None]
    return [*tiles, *(overrides or [])]


@app.command(name="validate")
def validate_command(
    source: Annotated[str, typer.Argument(help="TOML config, or a manifest folder, or a CSV or Parquet table.")],
    decode: Annotated[bool, typer.Option(help="Decode every image and mask on the cluster.")] = False,
    scratch: Annotated[
        str | None,
        typer.Option(help="Empty folder or s3:// prefix for passing files; several nodes need it. Spreads the work."),
    ] = None,
    set_: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Print every problem of a data set at once, with file and row."""
    cluster, stream = ClusterSettings(), StreamSettings()
    passing = Storage(scratch) if scratch else None
    settings: PrepareSettings | str
    if source.endswith(".toml"):
        experiment = load_experiment(source, set_ or [])
        cluster, stream, settings = experiment.cluster, experiment.stream, experiment.prepare
    else:
        settings = source
    problems = with_ray(
        cluster,
        (decode or passing is not None) and stream.num_actors > 0,
        lambda: validate(
            settings,
            decode=decode,
            stream=stream,
            progress=Progress(),
            scratch=passing,
            shared_folder=cluster.shared_folder,
        ),
        verbose,
    )
    typer.echo(format_problems(problems))
    if any(problem.is_error for problem in problems):
        raise SystemExit(2)


@app.command(name="predict")
def predict_command(
    images: Annotated[
        str, typer.Argument(help="A folder, an image, a manifest, or a CSV or Parquet table with a column uri.")
    ],
    model: Annotated[str, typer.Option(help="The folder `segmenter` of a finished run.")],
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix for the masks.")],
    base_px: Annotated[
        int | None, typer.Option(min=16, help="Short side the network sees; default: as in training.")
    ] = None,
    window_px: Annotated[
        int | None, typer.Option(min=16, help="Look at large images through windows of this side.")
    ] = None,
    window_stride_px: Annotated[
        int | None, typer.Option(min=1, help="Pixels between windows; default: half a window.")
    ] = None,
    flip: Annotated[bool, typer.Option(help="Average with the mirrored image.")] = True,
    num_actors: Annotated[int, typer.Option(min=0, help="Ray actors; 0 works in process, without Ray.")] = 0,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="GPUs an actor asks for.")] = 0.0,
    max_bad_frac: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images that may be unreadable.")
    ] = 0.02,
    shared_folder: Annotated[bool, typer.Option(help="Every node of the cluster mounts the output folder.")] = False,
    verbose: Verbose = False,
) -> None:
    """Masks for images without tags, from a trained segmenter."""
    settings = predict.PredictSettings(
        base_px=base_px, flip=flip, window_px=window_px, window_stride_px=window_stride_px
    )
    stream = StreamSettings(num_actors=num_actors, gpus_per_actor=gpus_per_actor, max_bad_frac=max_bad_frac)
    rows = list_images(images)
    folder = Storage(output)

    def work() -> dict[str, Any]:
        if num_actors > 0:
            check_shared_storage(folder, shared_folder)
        return predict.predict_images(
            Progress(), segmenter=Storage(model), rows=rows, output=folder, settings=settings, stream=stream
        )

    stats = with_ray(ClusterSettings(), num_actors > 0, work, verbose)
    typer.echo(
        f"{stats['num_images']} masks in {Storage(output).uri('png')}, {stats['num_bad']} images could not be read"
    )
    for line in told(folder, stats):
        typer.echo(line)


app.command(name="submission")(submission.submit)
app.command(name="submit")(submit.submit_command)
app.command(name="compare")(compare.compare)


@app.command(name="evaluate")
def evaluate_command(
    run_output: Annotated[str, typer.Argument(help="Output of a run: its manifest has the masks and the classes.")],
    split: Annotated[str, typer.Option(help="Split of the manifest.")] = "val",
    predictions: Annotated[
        str | None, typer.Option(help="Folder of <image_id>.png; default: the run's predictions.")
    ] = None,
) -> None:
    """Print mIoU, per-class IoU and pixel accuracy, and the protocol they were taken by."""
    storage = Storage(run_output)
    manifest = open_manifest(storage)
    folder = Storage(predictions) if predictions else storage.child("predictions/png")
    own = not predictions and storage.exists("evaluation/scores.json")
    protocol = storage.read_json("evaluation/scores.json")["protocol"] if own else None
    scores = evaluate.evaluate_folder(manifest, split, folder, protocol)
    summary.print_scores(scores, manifest.classes.names)


@app.command(name="report")
def report_command(config: Config, set_: Overrides = None, verbose: Verbose = False) -> None:
    """Make the HTML report of a run again, from what is there."""
    experiment = load_experiment(config, set_ or [])
    report.write_report(Storage(experiment.output), experiment, command=_command())
    typer.echo(Storage(experiment.output).uri("report/index.html"))


@app.command(name="results")
def results_command(
    outputs: Annotated[list[str], typer.Argument(help="Output folders of finished runs of one config.")],
) -> None:
    """Print the scores of several runs, say of three seeds, as a Markdown table with mean and spread."""
    typer.echo(results.results_tables(outputs))


def _command() -> str:
    """The command line as typed, for the report."""
    return shlex.join(["subcat", *sys.argv[1:]])
