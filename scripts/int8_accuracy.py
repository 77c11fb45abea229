"""INT8 against FP32 on the held-out images of trained runs: a Markdown table pooled over the seeds, and one by run.

    python scripts/int8_accuracy.py DATA RUN... [--methods mse entropy] [--images 256] [--out TABLE.md]

Every RUN holds ``model.onnx`` (``edge-dsc export RUN``) and its split. Images of the evaluation and test parts
judge; calibration sees training images only. The graphs are those that ``build-engine --int8`` builds from: signed
for TensorRT, with FP16 around INT8, and unsigned for ONNX Runtime, which answers for both. ``mse`` gives rows with what
is learnt beside the ranges, and rows ``mse alone`` without. A folder ``RUN-qat`` beside a run (``edge-dsc train DATA
--qat RUN``) gives rows with the method ``qat``, held against the FP32 answers of RUN.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from turns import script_parser

from calibration.table import METHODS, QAT_METHOD, CalibrationTable, load_table
from edge_dsc.build.calibrate import CALIBRATION_NAME, CalibrationRequest, run_calibration
from edge_dsc.build.engine import graph_in_precision
from edge_dsc.data.loading import load_images
from edge_dsc.data.purposes import PARTS_FOR, Purpose
from edge_dsc.evaluate.agreement import LabelledImages, compare_answers
from edge_dsc.evaluate.evaluation import labelled_samples
from edge_dsc.training.run_folder import load_training_record
from engines.cpu.ort import open_session
from engines.files import write_text
from engines.graph import load_model
from engines.record import Agreement, Precision
from engines.runtimes import get_runtime
from engines.text_table import Table, render_markdown

_RUNTIMES = {"signed": "tensorrt-rtx", "unsigned": "onnxruntime"}
_BATCH = 16
# What is asked for beside the method, by the name of the rows.
_WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "mse": {"mse": {}, "mse alone": {"rounding": "nearest", "bias_correction": False}}
}
_HEADER = (
    *("network", "seed", "method", "graph", "images", "FP32 %", "INT8 %", "difference", "95 % interval"),
    *("agreement %", "lost", "won", "McNemar p"),
)


@dataclass(frozen=True)
class Answers:
    """What FP32 and one INT8 graph answered on one run's held-out images."""

    network: str
    seed: int
    method: str
    graph: str
    true: NDArray[np.int64]
    reference: NDArray[np.float32]
    candidate: NDArray[np.float32]
    paths: tuple[str, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.process_time()
    found = [row for run in options.runs for row in _measure_run(run, options)]
    machine = f"{platform.machine()}, onnxruntime; {time.process_time() - started:.0f} CPU seconds"
    text = f"{render_markdown(_table(found, pooled=True))}\n\n{render_markdown(_table(found))}\n\n{machine}\n"
    print(text)  # noqa: T201
    if options.out is not None:
        write_text(options.out, text)


def _measure_run(run: Path, options: argparse.Namespace) -> Iterator[Answers]:
    record = load_training_record(run)
    model = load_model(run / "model.onnx")
    contract = model.contract
    samples = labelled_samples(options.data, run / "split.json", PARTS_FOR[Purpose.JUDGE])
    loaded = load_images(options.data, samples, contract)
    reference = _answer(model.proto, loaded.pixels)
    for method, source, table in _tables(run, options):
        int8 = load_model(source).proto
        for graph, name in _RUNTIMES.items():
            quantized = graph_in_precision(int8, Precision.INT8, table, get_runtime(name))
            yield Answers(
                network=record.architecture,
                seed=record.seed,
                method=method,
                graph=graph,
                true=np.array([contract.labels.index(sample.label) for sample in loaded.samples]),
                reference=reference,
                candidate=_answer(quantized, loaded.pixels),
                paths=tuple(sample.path for sample in loaded.samples),
                patients=tuple(sample.patient for sample in loaded.samples),
                labels=contract.labels,
            )


def _tables(run: Path, options: argparse.Namespace) -> Iterator[tuple[str, Path, CalibrationTable]]:
    """Yield the rows' name, FP32 model and table."""
    model = run / "model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        ways = [
            (method, name, asked)
            for method in options.methods
            for name, asked in _WAYS.get(method, {method: {}}).items()
        ]
        for method, name, asked in ways:
            request = CalibrationRequest(
                model=model,
                data=options.data,
                method=method,
                images=options.images,
                out=Path(folder) / f"{name}.json",
                **asked,
            )
            yield name, model, run_calibration(request).table
    tuned = run.with_name(f"{run.name}-{QAT_METHOD}")
    if (tuned / CALIBRATION_NAME).is_file():
        yield QAT_METHOD, tuned / "model.onnx", load_table(tuned / CALIBRATION_NAME)


def _answer(model: ModelProto, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = open_session(model.SerializeToString(), "graph", threads=1, remedy="export it again")
    parts = [
        session.run(None, {"image": pixels[start : start + _BATCH]})[0]
        for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(parts)


def _table(found: list[Answers], *, pooled: bool = False) -> Table:
    groups: dict[tuple[str, ...], list[Answers]] = {}
    for row in found:
        seed = "pooled" if pooled else str(row.seed)
        groups.setdefault((row.network, seed, row.method, row.graph), []).append(row)
    return Table(
        title="INT8 against FP32, pooled over the seeds" if pooled else "INT8 against FP32, run by run",
        header=_HEADER,
        rows=tuple((*key, *_cells(_pool(rows))) for key, rows in groups.items()),
    )


def _pool(rows: list[Answers]) -> Agreement:
    """Compare all of some runs' answers at once; a patient who is held out in several runs is one patient."""
    images = LabelledImages(
        true=np.concatenate([row.true for row in rows]),
        labels=rows[0].labels,
        paths=[path for row in rows for path in row.paths],
        patients=[patient for row in rows for patient in row.patients],
    )
    return compare_answers(
        images,
        np.concatenate([row.reference for row in rows]),
        np.concatenate([row.candidate for row in rows]),
        name="FP32",
    )


def _cells(found: Agreement) -> tuple[str, ...]:
    accuracy = found.accuracy
    return (
        str(found.images),
        f"{100 * accuracy.reference:.2f}",
        f"{100 * accuracy.candidate:.2f}",
        f"{100 * accuracy.difference:+.2f}",
        f"{100 * accuracy.low:+.2f} to {100 * accuracy.high:+.2f}",
        f"{100 * found.same_top1 / found.images:.2f}",
        str(found.lost),
        str(found.won),
        f"{found.mcnemar_p:.3g}",
    )


if __name__ == "__main__":
    main()
