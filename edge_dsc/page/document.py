"""Reports as one HTML file: sections of text, tables, plots and pictures; it loads nothing from a network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader

from bench.compare import Comparison
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
    opening_tables,
    pass_tables,
    ratio_table,
    report_ratios,
    scenario_tables,
    stage_table,
    tail_table,
)
from edge_dsc.page import CSS
from edge_dsc.page.charts import (
    Plot,
    accuracy_plot,
    distribution_plot,
    ratio_plot,
    roofline_plot,
    stage_plot,
    time_plot,
)
from engines.files import PAGE, write_text
from engines.text_table import Table, render_html

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG picture.

    Attributes:
        png: The file's bytes.
        caption: What it shows, for readers who see it and for those who do not.

    Raises:
        ValueError: The bytes are not a PNG file.
    """

    png: bytes
    caption: str

    def __post_init__(self) -> None:
        """Check the signature."""
        if not self.png.startswith(_PNG):
            raise ValueError(f"the picture {self.caption!r} is no PNG")

    @property
    def base64(self) -> str:
        """The file for a ``data:`` address."""
        return b64encode(self.png).decode("ascii")


Part = str | Table | Picture | Plot


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        title: The heading.
        parts: In order: text (a paragraph), tables, pictures, plots; None stands for a plot with nothing to show.
    """

    title: str
    parts: tuple[Part | None, ...]


def make_page(title: str, sections: Sequence[Section], *, summary: str = "") -> str:
    """Return a whole HTML document. Every text is escaped: names may hold anything.

    Args:
        title: Title and first heading.
        sections: What follows.
        summary: A paragraph below the title.
    """
    environment = Environment(
        loader=PackageLoader("edge_dsc", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table_html"] = render_html
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.tests["picture"] = lambda part: isinstance(part, Picture)
    template = environment.get_template("page.html.j2")
    return template.render(title=title, sections=sections, summary=summary, css=CSS)


def save_page(path: Path, title: str, sections: Sequence[Section], *, summary: str = "") -> None:
    """Write a page.

    Raises:
        EnvironmentProblem: matplotlib is missing, or the place cannot be written.
    """
    write_text(path, make_page(title, sections, summary=summary), PAGE)


def report_sections(
    report: Report, *, baseline: str | None = None, accuracies: Mapping[str, float] | None = None
) -> tuple[Section, ...]:
    """Return the sections of a latency report: distribution, stages, ratios, passes, accuracy, time, machine.

    Args:
        report: The report.
        baseline: The subject that the others are compared with; the first one by default.
        accuracies: Engine name -> accuracy, 0 to 1, where it is known.
    """
    latency = (
        latency_table(report),
        *scenario_tables(report),
        tail_table(report),
        distribution_plot(report),
        _quartile_table(report),
    )
    sections = [Section("Latency", latency)]
    if has_stages(report):
        sections.append(Section("Stages", (stage_table(report), stage_plot(report))))
    if len(report.measured) > 1:
        ratios, notes = report_ratios(report, baseline=baseline)
        tables = (ratio_table(ratios, notes=notes), *opening_tables(ratios))
        sections.append(Section("Compared", (ratio_plot(ratios), *tables)))
    tables = (*([build_table(report)] if build_spreads(report) else []), *pass_tables(report))
    if tables:
        sections.append(Section("Builds, limits, power, memory", (*tables, roofline_plot(report))))
    if accuracies:
        parts = (accuracy_plot(report, accuracies), _accuracy_table(report, accuracies))
        sections.append(Section("Accuracy against latency", parts))
    sections.append(Section("Over time", (time_plot(report), drift_table(report))))
    sections.append(Section("Machine", (environment_table(report),)))
    return tuple(sections)


def comparison_sections(comparison: Comparison | Fleet) -> tuple[Section, ...]:
    """Return the sections of a comparison of two reports, or of many."""
    if isinstance(comparison, Fleet):
        return (Section("Fleet", fleet_tables(comparison)),)
    tables = (comparison_table(comparison), *opening_tables(comparison.rows))
    return (Section("Compared", (ratio_plot(comparison.rows), *tables)),)


def _quartile_table(report: Report) -> Table:
    rows = []
    for subject in report.measured:
        values = np.percentile(subject.ordered_ns, (0, 25, 50, 75, 100))
        rows.append((subject.name, *(milliseconds(float(value)) for value in values)))
    header = ("engine", "fastest", "first quarter", "half", "three quarters", "slowest")
    return Table(title="Calls answered within, ms", header=header, rows=tuple(rows))


def _accuracy_table(report: Report, accuracies: Mapping[str, float]) -> Table:
    rows = tuple(
        (subject.name, milliseconds(sample_median(subject)), f"{accuracies[subject.name]:.2%}")
        for subject in report.measured
        if subject.name in accuracies
    )
    return Table(title="Accuracy and latency", header=("engine", "median, ms", "accuracy"), rows=rows)
