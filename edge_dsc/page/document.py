"""One self-contained HTML page: paragraphs, tables, pictures and plots. No network, no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench.bootstrap import sample_median
from bench.compare import Comparison, Ratio
from bench.fleet import Fleet
from bench.fleet_tables import fleet_tables
from bench.pass_tables import pass_tables, scenario_tables
from bench.report import Report
from bench.tables import (
    Table,
    build_table,
    comparison_table,
    drift_table,
    environment_table,
    has_stages,
    latency_table,
    milliseconds,
    ratio_table,
    report_ratios,
    stage_table,
    tail_table,
)
from bench.variance import build_spreads
from edge_dsc.page.plots import distribution_plot, ratio_plot
from edge_dsc.page.series import accuracy_plot, roofline_plot, stage_plot, time_plot
from edge_dsc.page.style import CSS
from engines.files import write_text
from engines.packages import load

_PNG = b"\x89PNG\r\n\x1a\n"
_FOOTER = "Made by edge-dsc. For research and engineering only; this is not a medical device."
_QUARTILES = (0, 25, 50, 75, 100)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG picture.

    Attributes:
        png: The file's bytes.
        caption: What it shows, for readers who see it and for those who do not.

    Raises:
        ValueError: The bytes are no PNG.
    """

    png: bytes
    caption: str

    def __post_init__(self) -> None:
        """Check the signature."""
        if not self.png.startswith(_PNG):
            raise ValueError(f"the picture {self.caption!r} is no PNG")


@dataclass(frozen=True)
class LatencyPlot:
    """The distribution of a report's latencies, with its quartiles as text.

    Attributes:
        report: The report.
    """

    report: Report


@dataclass(frozen=True)
class RatioPlot:
    """Ratios of latencies with their intervals.

    Attributes:
        ratios: What to draw, from top to bottom.
    """

    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class Drawing:
    """A plot of ours as inline SVG; it may be empty, then nothing is shown.

    Attributes:
        svg: The drawing: markup, made by edge_dsc.page.plots or edge_dsc.page.series.
        caption: What it shows.
    """

    svg: str
    caption: str


Part = str | Table | Picture | LatencyPlot | RatioPlot | Drawing


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        title: The heading.
        parts: In order: text (a paragraph), tables, pictures, plots.
    """

    title: str
    parts: tuple[Part, ...]


def make_page(title: str, sections: Sequence[Section], *, summary: str = "") -> str:
    """Return a whole HTML document. Every text is escaped: names may hold anything.

    Args:
        title: Title and first heading.
        sections: What follows.
        summary: A paragraph below the title.
    """
    body = [f"<h1>{escape(title)}</h1>", *([_paragraph(summary)] if summary else [])]
    for section in sections:
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        body += [_part(part) for part in section.parts]
        body.append("</section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A file name that gets past the escaping still cannot run or load anything.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + f"\n</main><footer><p>{_FOOTER}</p></footer></body></html>\n"
    )


def report_sections(
    report: Report, *, baseline: str | None = None, accuracies: Mapping[str, float] | None = None
) -> tuple[Section, ...]:
    """Return the sections of a latency report: distribution, ratios, time, stages, passes, accuracy, machine.

    Args:
        report: The report.
        baseline: The subject that the others are compared with; the first one by default.
        accuracies: Engine name -> accuracy, 0 to 1, where it is known.
    """
    sections = [
        Section(
            "Latency",
            (latency_table(report), *scenario_tables(report), tail_table(report), LatencyPlot(report)),
        )
    ]
    if has_stages(report):
        plot = Drawing(stage_plot(report), "Stages of a request, one bar an engine.")
        sections.append(Section("Stages", (stage_table(report), plot)))
    if len(report.measured) > 1:
        ratios, notes = report_ratios(report, baseline=baseline)
        sections.append(Section("Compared", (RatioPlot(ratios), ratio_table(ratios, notes=notes))))
    tables = (*([build_table(report)] if build_spreads(report) else []), *pass_tables(report))
    if tables:
        roof = Drawing(roofline_plot(report), "Each engine below the roof that was measured on this machine.")
        sections.append(Section("Builds, limits, power, memory", (*tables, roof)))
    if accuracies:
        sections.append(Section("Accuracy against latency", _accuracy_parts(report, accuracies)))
    over_time = Drawing(
        time_plot(report), "Median of each block over the run; shaded: the machine throttled."
    )
    sections.append(Section("Over time", (over_time, drift_table(report))))
    sections.append(Section("Machine", (environment_table(report),)))
    return tuple(sections)


def _accuracy_parts(report: Report, accuracies: Mapping[str, float]) -> tuple[Part, ...]:
    known = [subject for subject in report.measured if subject.name in accuracies]
    rows = tuple(
        (subject.name, milliseconds(sample_median(subject)), f"{accuracies[subject.name]:.2%}")
        for subject in known
    )
    table = Table(title="Accuracy and latency", header=("engine", "median, ms", "accuracy"), rows=rows)
    return (
        Drawing(accuracy_plot(report, accuracies), "Up and to the left is better."),
        table,
    )


def comparison_sections(comparison: Comparison | Fleet) -> tuple[Section, ...]:
    """Return the sections of a comparison of two reports, or of many."""
    if isinstance(comparison, Fleet):
        return (Section("Fleet", fleet_tables(comparison)),)
    return (Section("Compared", (RatioPlot(comparison.rows), comparison_table(comparison))),)


def save_page(path: Path, title: str, sections: Sequence[Section], *, summary: str = "") -> None:
    """Write a page.

    Raises:
        EnvironmentProblem: The place cannot be written.
    """
    write_text(path, make_page(title, sections, summary=summary))


def _part(part: Part) -> str:
    if isinstance(part, str):
        return _paragraph(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Picture):
        return _picture(part)
    if isinstance(part, Drawing):
        return _figure(part.svg, part.caption)
    if isinstance(part, LatencyPlot):
        return _figure(distribution_plot(part.report), "Share of calls answered within a time.") + _table(
            _quartile_table(part.report)
        )
    return _figure(
        ratio_plot(part.ratios),
        "Ratio of the medians with its 95 % interval; within the grey band there is no difference worth a word.",
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = escape(picture.caption)
    return _figure(f'<img alt="{caption}" src="data:image/png;base64,{data}">', picture.caption)


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>" if drawing else ""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    style = ' class="numeric"' if table.numeric else ""
    return (
        f'<p class="caption">{escape(table.title)}</p>'
        f'<div class="scroll"><table{style} aria-label="{escape(table.title)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _quartile_table(report: Report) -> Table:
    np = load("numpy")
    rows = []
    for subject in report.measured:
        values = np.percentile(subject.ordered_ns, _QUARTILES)
        rows.append((subject.name, *(milliseconds(float(value)) for value in values)))
    header = ("engine", "fastest", "first quarter", "half", "three quarters", "slowest")
    return Table(title="Calls answered within, ms", header=header, rows=tuple(rows))
