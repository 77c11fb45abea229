"""Commands that use an engine: infer, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli.options import Engine, Json, Out, Threads


def infer(
    engine: Engine,
    source: Annotated[
        str, typer.Argument(help="An image, a folder (recursive) or a quoted glob.", show_default=False)
    ],
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out", help="Write .csv or .jsonl; default: CSV on standard output.", show_default=False
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Classify images: the top class and all probabilities, one row an image."""
    from edge_dsc.console import give_json, progress_bar, say
    from edge_dsc.folder_loop import default_threads
    from edge_dsc.inference import infer_source

    with progress_bar() as progress:
        summary = infer_source(
            engine, source, out=out, threads=threads or default_threads(), keep_rows=json, progress=progress
        )
    say(summary.line())
    if json:
        give_json("edge-dsc/infer-result", summary.to_dict())


def evaluate(
    engine: Engine,
    data: Annotated[
        Path, typer.Argument(help="Folder of labelled images, DIR/class/file.", show_default=False)
    ],
    reference: Annotated[
        Optional[Path],
        typer.Option("--reference", help="An engine to compare the answers with.", show_default=False),
    ] = None,
    split: Annotated[
        Optional[list[str]],
        typer.Option("--split", help="Only this part of the engine's run: evaluation, test, ... Repeatable."),
    ] = None,
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure how right an engine is on labelled images, and whether it agrees with another."""
    from edge_dsc.console import give, give_json, progress_bar, say
    from edge_dsc.evaluation import evaluate as run_evaluation
    from edge_dsc.evaluation_report import KIND, format_evaluation, save_evaluation
    from edge_dsc.folder_loop import default_threads

    with progress_bar() as progress:
        result = run_evaluation(
            engine,
            data,
            reference=reference,
            parts=tuple(split or ()),
            threads=threads or default_threads(),
            progress=progress,
        )
    for path, reason in result.skipped:
        say(f"skipped {path}: {reason}")
    if out is not None:
        save_evaluation(out, result)
    if json:
        give_json(KIND, result.to_dict())
    else:
        give(format_evaluation(result))
