"""The demo's page: phantoms, training, the table and the latencies, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.report import Report
from edge_dsc.demo.rows import DemoResult, demo_table
from edge_dsc.page.document import Picture, Section, report_sections, save_page
from edge_dsc.training import TrainResult
from engines.images import decode_grey, read_bytes, resize_to
from engines.packages import load

_TILES = 4  # phantoms a class on the contact sheet
_TILE = 180  # pixels a side


def save_demo_page(
    result: DemoResult, report: Report, trained: Mapping[str, TrainResult], data: Path
) -> None:
    """Write the page of a demo run."""
    sections = [
        Section("DSC against CNN", (demo_table(result.rows, result.notes),)),
        Section("The phantoms", (_contact_sheet(trained, data),)),
    ]
    for arch, run in trained.items():
        pictures = tuple(
            Picture(png=(run.run / name).read_bytes(), caption=f"{arch}: {caption}")
            for name, caption in (
                ("curves.png", "loss and accuracy over the epochs"),
                ("confusion.png", "confusion matrix on evaluation and test images"),
            )
        )
        sections.append(Section(f"Training of {arch}", pictures))
    summary = (
        "The whole line of edge-dsc on procedural phantoms: "
        "the figures show the toolkit at work and nothing about X-rays."
    )
    save_page(result.page, "edge-dsc demo", [*sections, *report_sections(report)], summary=summary)


def _contact_sheet(trained: Mapping[str, TrainResult], data: Path) -> Picture:
    numpy = load("numpy")
    cv2 = load("cv2")
    split = next(iter(trained.values())).split
    rows = []
    for label in split.labels:
        samples = [sample for sample in split.samples("train") if sample.label == label][:_TILES]
        tiles = [resize_to(decode_grey(read_bytes(data / sample.path)), _TILE, _TILE) for sample in samples]
        rows.append(numpy.hstack(tiles))
    _, png = cv2.imencode(".png", numpy.vstack(rows))
    return Picture(png=png.tobytes(), caption=f"Training phantoms, a row a class: {', '.join(split.labels)}")
