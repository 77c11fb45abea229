"""Reports as one HTML file: sections of tables, plots and pictures, nothing from a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from bench.compare import Comparison, Ratio
from bench.fleet import Fleet
from bench.report import Report
from bench.statistics import build_spreads, sample_median
from bench.tables import (
    build_table,
    comparison_table,
    drift_table,
    environment_table,
    fleet_tables,
    has_stages,
    latency_table,
    milliseconds,
    pass_tables,
    ratio_table,
    report_ratios,
    scenario_tables,
    stage_table,
    tail_table,
)
from edge_dsc.page.charts import (
    accuracy_plot,
    distribution_plot,
    ratio_plot,
    roofline_plot,
    stage_plot,
    time_plot,
)
from engines.files import write_text
from engines.text_table import Table

# Series colours keep apart for the common kinds of colour blindness and are told apart by dash as well;
# after Okabe and Ito, Color Universal Design (2008), darkened on white and lightened on black for contrast.
CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1e23; --soft: #5b626d; --line: #d9dde3;
  --faint: #f4f6f8; --band: #e6eaf0; --s0: #0063a6; --s1: #c24a00; --s2: #007a5a; --s3: #964a80;
  --s4: #8a6600; --s5: #565b63; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e7e9ec; --soft: #a2aab5;
  --line: #343a43; --faint: #1c2026; --band: #2a3039; --s0: #62b3f2; --s1: #ff9c5c; --s2: #40c9a0;
  --s3: #e39cc8; --s4: #e2bd4c; --s5: #b4bac3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
main { padding-top: 2.5rem; }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; margin: 2.75rem 0 .75rem; }
h1, h2, p, li, figcaption { overflow-wrap: anywhere; }
th, td { overflow-wrap: break-word; }
p { max-width: 42rem; margin: .6rem 0; }
.caption { color: var(--soft); font-size: .875rem; margin: 1.25rem 0 0; }
.scroll { overflow-x: auto; margin: .25rem 0 .5rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { font-weight: 600; color: var(--soft); border-bottom-color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 600; }
.numeric :is(th, td):not(:first-child) { text-align: right; white-space: nowrap; }
.notes { margin: .4rem 0 0; padding: 0; list-style: none; color: var(--soft); font-size: .875rem; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; max-width: 37rem; height: auto; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .5rem; max-width: 42rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .25rem 0 .5rem; padding: 0;
  list-style: none; font-size: .875rem; font-variant-numeric: tabular-nums; }
.legend svg { display: inline-block; width: 30px; max-width: none; height: 10px; margin-right: .5rem; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.name { fill: var(--ink); font-weight: 600; }
svg text.value { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.band { fill: var(--band); }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.series.roof { stroke: var(--soft); }
.fill.c0, .dot.c0 { fill: var(--s0); } .fill.c1, .dot.c1 { fill: var(--s1); } .fill.c2, .dot.c2 { fill: var(--s2); }
.fill.c3, .dot.c3 { fill: var(--s3); } .fill.c4, .dot.c4 { fill: var(--s4); } .fill.c5, .dot.c5 { fill: var(--s5); }
.fill { stroke: none !important; }
.throttled { fill: var(--s1); opacity: .25; }
.mark { fill: var(--s0); }
.bar { stroke: var(--s0); stroke-width: 2.5; }
.c0 { stroke: var(--s0); } .c1 { stroke: var(--s1); } .c2 { stroke: var(--s2); }
.c3 { stroke: var(--s3); } .c4 { stroke: var(--s4); } .c5 { stroke: var(--s5); }
footer { color: var(--soft); font-size: .875rem; padding-top: 1rem; padding-bottom: 2.5rem; margin-top: 3rem; }
footer p { border-top: 1px solid var(--line); padding-top: 1rem; max-width: none; }
@media (max-width: 34rem) { body { font-size: 15px; } main { padding-top: 1.5rem; } h1 { font-size: 1.45rem; }
  main, footer { padding-left: 1rem; padding-right: 1rem; } svg text { font-size: 14px; }
  .scroll { margin-right: -1rem; padding-right: 1rem; }
  .scroll .numeric :is(th, td):first-child { position: sticky; left: 0; background: var(--paper);
    white-space: normal; min-width: 6rem; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb;
  --band: #e6e6e6; --s0: #0063a6; --s1: #c24a00; --s2: #007a5a; --s3: #964a80; --s4: #8a6600; --s5: #565b63; }
  body { font-size: 10pt; } main, footer { max-width: none; padding-left: 0; padding-right: 0; }
  main { padding-top: 0; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  th, td { padding: .2rem .4rem; } thead th { white-space: normal !important; }
  figure, tr { break-inside: avoid; } h2, .caption { break-after: avoid; } figure svg { max-width: 15cm; }
  @page { margin: 1.6cm; } }
"""


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
        svg: The drawing: markup, made by edge_dsc.page.charts or edge_dsc.page.charts.
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
    rows = []
    for subject in report.measured:
        values = np.percentile(subject.ordered_ns, _QUARTILES)
        rows.append((subject.name, *(milliseconds(float(value)) for value in values)))
    header = ("engine", "fastest", "first quarter", "half", "three quarters", "slowest")
    return Table(title="Calls answered within, ms", header=header, rows=tuple(rows))
