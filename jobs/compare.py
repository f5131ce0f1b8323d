"""`subcat compare RUN RUN ...`: what differs between runs, their results side by side, on the terminal and as a page.

Reads:   config.json, markers and scores of each run, finished or not; for the page a few masks and maps
Writes:  one HTML page
Runs on: the driver
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Storage
from cluster.tracking_client import safe_text
from jobs.compare_page import comparison_page
from jobs.compare_runs import Comparison, Row, compare_runs, open_runs, shown

_LONGEST_KEY = 44
"""Characters that the first column keeps before the runs' columns get narrower."""


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Output folders or s3:// prefixes of two or more runs, or MLflow run ids or names."),
    ],
    output: Annotated[str, typer.Option(help="The page to write, a path or an s3:// URI.")] = "compare.html",
    tracking_uri: Annotated[
        str | None,
        typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server where run ids and names are looked up."),
    ] = None,
    num_examples: Annotated[int, typer.Option(min=0, max=100, help="Pictures on the page.")] = 8,
) -> None:
    """Print what differs between runs, settings and results side by side, and write it as a page."""
    compared = compare_runs(open_runs(runs, tracking_uri))
    print_comparison(compared)
    folder, _, name = output.rpartition("/")
    storage = Storage(folder or ("/" if output.startswith("/") else "."))
    storage.write_bytes(name, comparison_page(compared, num_examples).encode())
    typer.echo(f"page: {storage.uri(name)}")


def print_comparison(compared: Comparison, console: Console | None = None) -> None:
    """Print tables that can be read at 100 columns."""
    console = console or Console()
    for run in compared.runs:
        where = escape(f"{safe_text(run.storage.root)}  ({run.state})")
        console.print(f"[bold]{escape(run.name)}[/]  {where}", highlight=False, soft_wrap=True)
    for note in compared.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    console.print("[bold]Settings that differ[/]" if compared.settings else "No setting that changes a result differs.")
    _print_rows(console, compared, compared.settings, left=True)
    for title, rows, left in (
        ("Settings of where and how fast that differ", compared.other_settings, True),
        ("How the scores were taken, where it differs", compared.protocols, True),
        ("Results", compared.results, False),
        ("Time", compared.times, False),
    ):
        if rows:
            console.print(f"[bold]{title}[/]")
            _print_rows(console, compared, rows, left)


def _print_rows(console: Console, compared: Comparison, rows: Sequence[Row], left: bool) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", min_width=min(_LONGEST_KEY, max(len(row.what) for row in rows)))
    for run in compared.runs:
        table.add_column(escape(run.name), justify="left" if left else "right", overflow="fold")
    for row in rows:
        differences = row.differences or [None] * len(row.cells)
        cells = [shown(cell, by) for cell, by in zip(row.cells, differences, strict=True)]
        table.add_row(*(escape(text) for text in (row.what, *cells)))
    console.print(table)
