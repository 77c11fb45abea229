"""Where the time of an engine goes on a GPU, and what our loop adds to the engine alone.

    python scripts/gpu_stages.py ENGINE [--images FOLDER] [--batch N] [--blocks 20] [--calls 50] [--out FILE]

It prints, and writes to --out as JSON with the machine and the engine's record:

- ``stages``: microseconds of decode and preprocess (monotonic clock, one thread, each image of the folder), of h2d,
  execute and d2h (CUDA events, batches one after the other).
- ``latency``: one batch from host memory to host memory, through our runner and bare: the same engine, switches
  (CUDA graph or none, device memory, spinning) and sizes, but nothing except copy, launch, synchronise, copy.
  The two take turns in blocks, ABBA; ``ratio`` is the median over the blocks of ours to bare, with its extremes.
- ``images_per_second``: batches through the loop that keeps the slots full, with one slot and with two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from turns import script_parser

from bench.machine import environment
from engines import images, packages
from engines.files import write_text
from engines.record import EngineRecord, load_record, read_engine
from engines.runtimes import Runner, RunnerOptions, answer_batches, open_engine
from engines.trt import cuda as cuda_driver
from engines.trt import versions
from engines.trt.cuda import capture_graph
from engines.trt.faults import process_logger

KIND, SCHEMA_VERSION = "edge-dsc/gpu-stages", 1
Pixels = images.InputPixels
Call = Callable[[Pixels], NDArray[np.float32]]


def main() -> None:
    """Measure, print and write."""
    options = _arguments()
    record = load_record(options.engine)
    size = options.batch or record.batch.best
    contract = record.contract
    noise = np.random.default_rng(0).integers(
        0, 256, (size, contract.height, contract.width, contract.channels), np.uint8
    )
    pixels = images.shape_input(noise, contract)
    body: dict[str, Any] = {
        "engine": msgspec.to_builtins(record),
        "batch": size,
        "graph": options.graph,
        "stages_us": stages(options, record, pixels),
        "latency": latency(options, record, pixels),
        "images_per_second": rates(options, pixels),
        "environment": environment(),
    }
    if options.out:
        document = {"kind": KIND, "schema_version": SCHEMA_VERSION, **body}
        write_text(options.out, json.dumps(document, indent=1, allow_nan=False) + "\n")
    shown = {name: body[name] for name in ("batch", "graph", "stages_us", "latency", "images_per_second")}
    print(json.dumps(shown, indent=1))  # noqa: T201


def stages(options: argparse.Namespace, record: EngineRecord, pixels: Pixels) -> dict[str, Any]:
    """Return median, p99 and count of every stage, microseconds; a p99 from fewer than 662 samples is None."""
    samples: dict[str, list[float]] = {"decode": [], "preprocess": [], "h2d": [], "execute": [], "d2h": []}
    for path in sorted(options.images.iterdir()) if options.images else []:
        data = images.read_bytes(path)
        started = time.perf_counter_ns()
        grey_or_colour = images.decode_image(data, record.contract, name=str(path))
        decoded = time.perf_counter_ns()
        images.prepare_pixels(grey_or_colour, record.contract, name=str(path))
        samples["decode"].append((decoded - started) / 1e3)
        samples["preprocess"].append((time.perf_counter_ns() - decoded) / 1e3)
    with open_runner(options, slots=1, time_stages=True) as runner:
        for _ in range(options.blocks * options.calls):
            ticket = runner.submit(pixels)
            runner.collect(ticket)
            for stage, duration in (ticket.stages_ns or {}).items():
                samples[stage].append(duration / 1e3)
    return {name: _summary(values) for name, values in samples.items() if values}


def latency(options: argparse.Namespace, record: EngineRecord, pixels: Pixels) -> dict[str, Any]:
    """Return our and the bare latency, microseconds, and their ratio over ABBA blocks."""
    with (
        open_runner(options, slots=1) as runner,
        open_bare(options.engine, record, len(pixels), graph=options.graph) as bare,
    ):
        description = dict(runner.description)
        difference = float(np.abs(runner.run(pixels) - bare(pixels)).max())
        calls: dict[str, Call] = {"ours": runner.run, "bare": bare}
        for call in calls.values():
            _block(call, pixels, options.calls)  # warm
        pairs, all_of = [], {name: list[float]() for name in calls}
        for index in range(options.blocks):
            order = ("ours", "bare") if index % 2 == 0 else ("bare", "ours")
            block = {name: _block(calls[name], pixels, options.calls) for name in order}
            pairs.append(statistics.median(block["ours"]) / statistics.median(block["bare"]))
            for name, values in block.items():
                all_of[name] += values
    ratio = {"median": statistics.median(pairs), "smallest": min(pairs), "largest": max(pairs)}
    summaries = {f"{name}_us": _summary(values) for name, values in all_of.items()}
    return {**summaries, "ratio": ratio, "largest_difference": difference, "runner": description}


def rates(options: argparse.Namespace, pixels: Pixels) -> dict[str, float]:
    """Return images per second with one slot and with two, batches ready in host memory."""
    found = {}
    for slots in (1, 2):
        with open_runner(options, slots=slots) as runner:
            batches = ((index, pixels) for index in range(options.blocks * options.calls))
            started = time.perf_counter()
            for _ in answer_batches(runner, batches):
                pass
            seconds = time.perf_counter() - started
        found[f"{slots} slots"] = round(options.blocks * options.calls * len(pixels) / seconds, 1)
    return found


def open_runner(options: argparse.Namespace, **more: Any) -> Runner:
    """Open the engine with the switches that both sides share."""
    return open_engine(options.engine, options=RunnerOptions(graph=options.graph, memory="device", **more))


@contextlib.contextmanager
def open_bare(engine: Path, record: EngineRecord, size: int, *, graph: bool) -> Iterator[Call]:
    """Give a function that answers one batch with nothing around the engine."""
    trt = packages.load("tensorrt_rtx" if record.runtime == "tensorrt-rtx" else "tensorrt")
    cuda = packages.load("pycuda.driver")
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    with contextlib.ExitStack() as frees:
        frees.callback(cuda_driver.release_context, cuda_driver.load_driver(), context)
        frees.callback(context.pop)
        contract = record.contract
        parts = SimpleNamespace(runtime=trt.Runtime(process_logger(trt)))
        frees.callback(vars(parts).clear)  # before the context that they live in
        parts.engine = parts.runtime.deserialize_cuda_engine(read_engine(engine, record))
        settings, _ = versions.make_runtime_config(trt, parts.engine)
        parts.execution = parts.engine.create_execution_context(*([settings] if settings is not None else []))
        stream = cuda.Stream(1)
        host_in = cuda.pagelocked_empty((size, *contract.input_shape), contract.dtype)
        host_out = cuda.pagelocked_empty((size, len(contract.labels)), np.float32)
        device_in, device_out = cuda.mem_alloc(host_in.nbytes), cuda.mem_alloc(host_out.nbytes)
        for memory in (host_in.base, host_out.base, device_in, device_out):
            frees.callback(memory.free)
        parts.execution.set_input_shape(contract.input_name, host_in.shape)
        parts.execution.set_tensor_address(contract.input_name, int(device_in))
        parts.execution.set_tensor_address(contract.output_name, int(device_out))

        def enqueue() -> None:
            cuda.memcpy_htod_async(device_in, host_in, stream)
            parts.execution.execute_async_v3(stream.handle)
            cuda.memcpy_dtoh_async(host_out, device_out, stream)

        launch = enqueue
        enqueue()
        stream.synchronize()
        if graph:
            captured = capture_graph(cuda_driver.load_driver(), stream.handle, enqueue)
            frees.callback(captured.destroy)
            launch = captured.launch
        frees.callback(stream.synchronize)

        def answer(batch: Pixels) -> NDArray[np.float32]:
            host_in[:] = batch
            launch()
            stream.synchronize()
            probabilities: NDArray[np.float32] = host_out.copy()
            return probabilities

        context.pop()
        frees.callback(context.push)  # for the frees; between calls nothing is current, as in the runner

        def current(batch: Pixels) -> NDArray[np.float32]:
            context.push()
            try:
                return answer(batch)
            finally:
                context.pop()

        yield current


def _block(call: Call, pixels: Pixels, calls: int) -> list[float]:
    samples = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call(pixels)
        samples.append((time.perf_counter_ns() - started) / 1e3)
    return samples


def _summary(values: list[float]) -> dict[str, Any]:
    enough = len(values) >= 662  # MLPerf early stopping for p99
    p99 = round(float(np.percentile(values, 99)), 1) if enough else None
    return {"median": round(statistics.median(values), 1), "p99": p99, "count": len(values)}


def _arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--images", type=Path, help="folder of image files for decode and preprocess")
    parser.add_argument("--batch", type=int, default=0, help="images a batch; the profile's best without it")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--calls", type=int, default=50, help="batches a block")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="enqueue on both sides")
    parser.add_argument("--out", type=Path, help="JSON report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
