"""Commands that use an engine: infer, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from edge_dsc.cli.console import give, give_json, progress_bar, say
from edge_dsc.cli.options import (
    Abstain,
    Cam,
    Device,
    Engine,
    GpuMemory,
    Graph,
    Html,
    Json,
    Out,
    Running,
    Server,
    Slots,
    Threads,
    Threshold,
    Wait,
    finite,
    parse_thresholds,
    running_options,
)
from engines.errors import UsageError

if TYPE_CHECKING:
    from edge_dsc.infer.archive import ArchiveRequest
    from edge_dsc.infer.served import ServedModel


def infer(
    engine: Annotated[
        Path,
        typer.Argument(
            help="An engine that build-engine wrote; with --server it may be left out.", show_default=False
        ),
    ],
    source: Annotated[
        Optional[str],
        typer.Argument(
            help="An image, a folder (recursive), a quoted glob, a video, /dev/videoN or v4l2://N, csi://N, "
            "rtsp://..., http://... (MJPEG), or - for a list of paths on standard input. Cameras take "
            "?width=1280&height=720&fps=30.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[str],
        typer.Option(
            "--out",
            help="Write .csv or .jsonl, row by row; default: CSV on standard output. With --ray a folder of parts, "
            "NAME.parquet or NAME.csv, or an address such as s3://bucket/NAME.parquet.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last row of --out (files and folders).")
    ] = False,
    limit: Annotated[
        Optional[int],
        typer.Option(
            "--limit", min=1, max=10**12, help="End after so many images or frames.", show_default=False
        ),
    ] = None,
    give_up: Annotated[
        Optional[float],
        typer.Option(
            "--give-up",
            min=0,
            callback=finite,
            metavar="SECONDS",
            help="End when a camera or stream stays away for so long; default: try for ever.",
            show_default=False,
        ),
    ] = None,
    annotate: Annotated[
        Optional[Path],
        typer.Option(
            "--annotate",
            help="Draw label, probability and latency on each picture: a folder, or a video (.avi, .mp4).",
            show_default=False,
        ),
    ] = None,
    save_unsure: Annotated[
        Optional[tuple[float, Path]],
        typer.Option(
            "--save-unsure",
            metavar="T DIR",
            help="Keep pictures whose best class is under T (such as 0.6) in DIR, for labelling.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show a window; q or Escape ends.")] = False,
    serve: Annotated[
        Optional[int],
        typer.Option(
            "--serve",
            min=0,
            max=65535,
            metavar="PORT",
            help="Serve a page with the live picture, the latest answers, rate and latency.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address for --serve; 0.0.0.0 lets the network look, without password."),
    ] = "127.0.0.1",
    ray: Annotated[
        Optional[str],
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Classify an archive on a Ray cluster (HOST:PORT, auto), or without an address on this machine: also "
            "lists (.txt), Parquet files of paths and object stores.",
            show_default=False,
        ),
    ] = None,
    server: Server = None,
    threshold: Threshold = None,
    abstain: Abstain = None,
    cam: Cam = False,
    threads: Threads = None,
    slots: Slots = None,
    graph: Graph = None,
    gpu_memory: GpuMemory = None,
    wait: Wait = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """One row per image or frame: the top class and all probabilities.

    Ctrl-C and SIGTERM finish the current picture, keep every row and print the summary. Of a camera or stream the
    newest frame is taken each time the engine is free; the others are counted as dropped. With --server a server
    runs the engine; one that is named too must be of the same model.
    """
    from edge_dsc.infer.inference import InferRequest, infer_source
    from edge_dsc.infer.sinks import Outputs
    from engines.images import usable_processors

    asked = Running(slots=slots, graph=graph, memory=gpu_memory, wait=wait, device=device)
    outputs = Outputs(annotate=annotate, unsure=save_unsure, show=show, serve=serve, host=host)
    if ray is not None:
        if (
            outputs != Outputs()
            or give_up is not None
            or server is not None
            or cam
            or out is None
            or source is None
        ):
            raise UsageError(
                "--ray writes rows and nothing else, to --out",
                remedy="write infer ENGINE SOURCE --ray --out NAME.parquet, and nothing that draws, waits or explains",
            )
        from edge_dsc.infer.archive import ArchiveRequest

        archive = ArchiveRequest(
            engine=engine,
            source=source,
            out=out,
            address=ray,
            resume=resume,
            limit=limit,
            threads=threads,
            thresholds=parse_thresholds(threshold),
            abstain=abstain,
            running=running_options([engine], asked),
        )
        return _infer_archive(archive, json=json)
    model, pictures = _model_and_source(engine, source, server)
    request = InferRequest(
        engine=model,
        source=pictures,
        out=None if out is None else Path(out),
        threads=threads or usable_processors(),
        keep_rows=json,
        resume=resume,
        limit=limit,
        give_up_s=give_up,
        running=running_options([model], asked),
        outputs=outputs,
        thresholds=parse_thresholds(threshold),
        abstain=abstain,
        cam=cam,
    )
    with progress_bar() as progress:
        summary = infer_source(request, progress=progress, say=say)
    say(summary.line())
    if json:
        give_json("edge-dsc/infer-result", summary, schema_version=2)


def _infer_archive(request: ArchiveRequest, *, json: bool) -> None:
    from edge_dsc.infer.archive import classify_archive

    with progress_bar() as progress:
        summary = classify_archive(request, progress=progress, say=say)
    say(summary.line())
    if json:
        give_json("edge-dsc/archive-result", summary)


def _model_and_source(engine: Path, source: str | None, server: str | None) -> tuple[Path | ServedModel, str]:
    """Return what runs and what it answers: ``ENGINE SOURCE``, or ``[ENGINE] SOURCE --server ADDRESS``."""
    from edge_dsc.infer.served import parse_server

    if server is not None and source is None:
        return parse_server(server), str(engine)
    if source is None:
        raise UsageError("infer takes an engine and a source", remedy="edge-dsc infer ENGINE SOURCE")
    return (engine if server is None else parse_server(server, expected=engine)), source


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
    threshold: Threshold = None,
    abstain: Abstain = None,
    cam: Cam = False,
    threads: Threads = None,
    device: Device = None,
    out: Out = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Accuracy, recall and F1 on labelled images; with --reference also where two engines answer differently.

    Thresholds are chosen on --split validation: chosen on the images that judge, they would flatter the engine there.
    """
    from edge_dsc.evaluate.evaluation import (
        EVALUATION,
        EvaluationRequest,
        format_evaluation,
        save_evaluation_page,
    )
    from edge_dsc.evaluate.evaluation import evaluate as run_evaluation
    from engines.files import PAGE, require_writable
    from engines.images import usable_processors

    for target, kind in ((out, EVALUATION.name), (html, PAGE)):
        if target is not None:
            require_writable(target, kind)
    request = EvaluationRequest(
        engine=engine,
        data=data,
        reference=reference,
        parts=tuple(split or ()),
        threads=threads or usable_processors(),
        running=running_options([engine], Running(device=device)),
        thresholds=parse_thresholds(threshold),
        abstain=abstain,
        cam=cam,
    )
    with progress_bar() as progress:
        result = run_evaluation(request, progress)
    for path, reason in result.skipped:
        say(f"skipped {path}: {reason}")
    if out is not None:
        EVALUATION.save(out, result)
    if html is not None:
        save_evaluation_page(html, result)
    if json:
        give_json(EVALUATION.name, result, schema_version=EVALUATION.version)
    else:
        give(format_evaluation(result))
