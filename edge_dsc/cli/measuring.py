"""Commands that measure and compare latency: bench, compare, import-times."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from edge_dsc.cli import INTERRUPTED
from edge_dsc.cli.console import give, give_json, progress_bar, say
from edge_dsc.cli.options import (
    MAX_THREADS,
    Batch,
    Device,
    GpuMemory,
    Graph,
    Html,
    Json,
    Out,
    Running,
    Seed,
    Slots,
    Wait,
    finite,
    running_options,
)
from engines.errors import UsageError

if TYPE_CHECKING:
    from bench.report import Report
    from edge_dsc.infer.served import ServedModel
    from edge_dsc.latency.subjects import BenchOptions

MAX_SECONDS = 7 * 86_400
MAX_PILE = 16_384  # images of a pile, which are all in memory


def bench(
    engines: Annotated[
        Optional[list[Path]],
        typer.Argument(help="Engines; the first is the baseline.", show_default=False),
    ] = None,
    server: Annotated[
        Optional[list[str]],
        typer.Option(
            "--server",
            metavar="ADDRESS",
            help="Also a model on a Triton server, grpc://HOST:8001/MODEL. Repeatable.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="10 seconds an engine after the warm-up, instead of 60.")
    ] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="600 seconds an engine, for figures that others will quote.")
    ] = False,
    duration: Annotated[
        Optional[float],
        typer.Option(
            "--duration",
            min=0,
            max=MAX_SECONDS,
            callback=finite,
            help="Seconds an engine, instead of 60.",
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        Optional[int],
        typer.Option(
            "--iterations",
            min=1,
            max=10_000_000,
            help="Requests an engine, instead of seconds.",
            show_default=False,
        ),
    ] = None,
    warmup: Annotated[
        Optional[float],
        typer.Option(
            "--warmup",
            min=0,
            max=MAX_SECONDS,
            callback=finite,
            help="Shortest warm-up, seconds.",
            show_default=False,
        ),
    ] = None,
    openings: Annotated[
        Optional[int],
        typer.Option(
            "--openings",
            min=1,
            max=1000,
            help="Open each engine so often, elsewhere in memory: two openings differ.  \\[default: 40, quick 20]",
            show_default=False,
        ),
    ] = None,
    batch: Batch = 1,
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=MAX_THREADS, help="CPU threads of one request.")
    ] = 1,
    slots: Slots = None,
    graph: Graph = None,
    gpu_memory: GpuMemory = None,
    wait: Wait = None,
    device: Device = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control", help="Open and measure the baseline a second time: it must not differ."
        ),
    ] = True,
    fps: Annotated[
        Optional[float],
        typer.Option(
            "--fps",
            min=0,
            max=100_000,
            callback=finite,
            help="Requests arrive at this rate, as a camera's frames.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Optional[str],
        typer.Option("--folder", help="Requests are the image files of a folder.", show_default=False),
    ] = None,
    offline: Annotated[
        Optional[int],
        typer.Option(
            "--offline", min=1, max=MAX_PILE, help="Requests are piles of so many images.", show_default=False
        ),
    ] = None,
    builds: Annotated[
        int,
        typer.Option(
            "--builds", min=1, max=1000, help="Build each engine so often, and tell the builds apart."
        ),
    ] = 1,
    power: Annotated[
        float,
        typer.Option(
            "--power",
            min=0,
            max=MAX_SECONDS,
            callback=finite,
            help="Seconds of a power pass of each engine; 0: none.",
        ),
    ] = 0.0,
    memory: Annotated[bool, typer.Option("--memory", help="Measure the peak of memory too.")] = False,
    limits: Annotated[
        bool, typer.Option("--limits", help="Hold CPU engines against the machine's own ceilings.")
    ] = False,
    seed: Seed = 0,
    out: Out = None,
    html: Html = None,
    evaluation: Annotated[
        Optional[list[Path]],
        typer.Option(
            "--evaluation", help="What evaluate --out wrote, for the page. Repeatable.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The engines take turns in short blocks, so that drift hits all alike; the report keeps every sample."""
    from bench.plan import choose_plan
    from bench.report import REPORT, compact_report, save_report
    from bench.tables import render_report
    from edge_dsc.evaluate.evaluation import read_accuracies
    from edge_dsc.latency.subjects import FOLDER, OFFLINE, BenchOptions, default_report_path, measure_engines

    subjects = _engines_and_models(engines, server)
    if sum(given is not None for given in (fps, folder, offline)) > 1:
        raise UsageError("--fps, --folder and --offline exclude each other", remedy="give one of them")
    scenario = FOLDER if folder is not None else OFFLINE if offline is not None else None
    if quick and publish:
        raise UsageError("--quick and --publish exclude each other", remedy="give one of them")
    chosen = choose_plan(
        "quick" if quick else "publish" if publish else "standard",
        seconds=duration,
        iterations=iterations,
        warmup_seconds=warmup,
        openings=openings,
        seed=seed,
        scenario=scenario,
        fps=fps,
    )
    options = BenchOptions(
        batch=batch,
        threads=threads,
        control=control,
        power_seconds=power,
        memory=memory,
        limits=limits,
        folder=folder,
        offline=offline,
        builds=builds,
        running=running_options(
            subjects, Running(slots=slots, graph=graph, memory=gpu_memory, wait=wait, device=device)
        ),
    )
    path = out or default_report_path()
    _require_places(path, REPORT.name, html)
    accuracies = read_accuracies(evaluation or ())
    with progress_bar() as progress:
        report = measure_engines(subjects, chosen, options, progress=progress)
    _say_what_is_missing(report, options)
    report = compact_report(report)
    save_report(path, report)
    say(f"report: {path}")
    if json:
        give_json(REPORT.name, REPORT.to_builtins(report), schema_version=REPORT.version)
    else:
        give(render_report(report))
    if html is not None:
        from edge_dsc.page.document import report_sections, save_page

        save_page(html, "Latency report", report_sections(report, accuracies=accuracies))
        say(f"page: {html}")
    _end_with(report)


def _engines_and_models(engines: list[Path] | None, server: list[str] | None) -> list[Path | ServedModel]:
    from edge_dsc.infer.served import parse_server

    subjects = [*(engines or ()), *map(parse_server, server or ())]
    if not subjects:
        raise UsageError("there is nothing to measure", remedy="name an engine, or a model with --server")
    return subjects


def _say_what_is_missing(report: Report, options: BenchOptions) -> None:
    from edge_dsc.latency.passes import memory_problems

    if options.power_seconds and not any("power" in subject.passes for subject in report.subjects):
        say("power: no rail can be read here (INA3221, RAPL, NVML)")
    for problem in memory_problems(report) if options.memory else ():
        say(f"memory: {problem}")
    if options.limits and not all("limits" in subject.passes for subject in report.measured):
        say("limits: told of engines on the processor that have their ONNX model beside them; not of a GPU's")


def _end_with(report: Report) -> None:
    """Choose the exit code of a measurement whose report is written and printed."""
    from bench.compare import require_stable

    if report.failed:
        count = sum(subject.control_of is None for subject in report.subjects)
        failed = sum(subject.control_of is None for subject in report.failed)
        say(f"error: {failed} of {count} engines failed; the report has the others")
        raise typer.Exit(1)
    if report.interrupted:
        say("interrupted: the report has what was measured until then")
        raise typer.Exit(INTERRUPTED)
    require_stable(report)


def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(
            help="One report; a baseline and a candidate; or three and more: device by engine.",
            show_default=False,
        ),
    ],
    allow: Annotated[
        Optional[list[str]],
        typer.Option(
            "--allow", help="A condition that may differ, such as cpu. Repeatable.", show_default=False
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option("--margin", min=0, callback=finite, help="Smallest difference worth a word, percent."),
    ] = 3.0,
    fail_if_slower: Annotated[
        Optional[float],
        typer.Option(
            "--fail-if-slower",
            callback=finite,
            help="Exit with 6 when slower by more, percent.",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", help="Write the comparison as Markdown too.", show_default=False),
    ] = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """The engines of one report, a baseline and a candidate, or many devices; what cannot be compared is refused."""
    from bench.compare import Comparison, require_fit_controls, require_no_regression
    from bench.fleet import compare_files
    from bench.tables import render_comparison
    from engines.files import MARKDOWN, write_text

    if fail_if_slower is not None and len(reports) > 2:
        raise UsageError(
            f"--fail-if-slower with {len(reports)} reports",
            remedy="give one report, or a baseline and a candidate",
        )
    _require_places(out, MARKDOWN, html)
    found = compare_files(reports, allow=allow or (), margin=margin / 100)
    if out is not None:
        write_text(out, render_comparison(found, markdown=True), MARKDOWN)
    if html is not None:
        from edge_dsc.page.document import comparison_sections, save_page

        save_page(html, "Comparison of latency reports", comparison_sections(found))
    if json:
        kind = "edge-dsc/comparison" if isinstance(found, Comparison) else "edge-dsc/fleet"
        give_json(kind, found, schema_version=2)
    else:
        give(render_comparison(found, markdown=markdown))
    require_fit_controls(found.controls)
    if fail_if_slower is not None and isinstance(found, Comparison):
        require_no_regression(found.rows, fail_if_slower)


def import_times(
    times: Annotated[
        Path, typer.Argument(help="A file that trtexec --exportTimes wrote.", show_default=False)
    ],
    name: Annotated[
        Optional[str],
        typer.Option("--name", help="Name of the engine; default: the file's.", show_default=False),
    ] = None,
    batch: Batch = 1,
    this_machine: Annotated[
        bool, typer.Option("--this-machine", help="The times were taken on this machine.")
    ] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """The report can then be compared with others by ``compare``."""
    from bench.report import REPORT, compact_report, save_report
    from bench.tables import render_report
    from bench.trtexec import import_trtexec

    path = out or times.with_name(f"{times.stem}.report.json")
    report = compact_report(import_trtexec(times, name=name, batch=batch, this_machine=this_machine))
    save_report(path, report)
    say(f"report: {path}")
    if json:
        give_json(REPORT.name, REPORT.to_builtins(report), schema_version=REPORT.version)
    else:
        give(render_report(report))


def _require_places(out: Path | None, kind: str, html: Path | None) -> None:
    """Refuse a place for the results or for the page before the work for it begins."""
    from engines.files import PAGE, require_writable

    if out is not None:
        require_writable(out, kind)
    if html is not None:
        require_writable(html, PAGE)
        if out is not None and os.path.realpath(out) == os.path.realpath(html):
            raise UsageError(f"--out and --html both name {html}", remedy="name two files")
