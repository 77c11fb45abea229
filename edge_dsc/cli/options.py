"""Options that several commands share, and texts that need more than typer's own parsing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from engines.errors import UsageError

if TYPE_CHECKING:
    from edge_dsc.build.gate import GateOptions
    from edge_dsc.infer.served import ServedModel
    from engines.record import BatchRange, Precision
    from engines.runtimes import RunnerOptions

Json = Annotated[
    bool, typer.Option("--json", help="Print one versioned JSON object; everything else to stderr.")
]
Out = Annotated[Optional[Path], typer.Option("--out", help="Where to write.", show_default=False)]
Html = Annotated[
    Optional[Path], typer.Option("--html", help="Write a page with plots too.", show_default=False)
]


def finite(value: Optional[float]) -> Optional[float]:
    """Refuse NaN, which passes every comparison with a limit, and infinity.

    Raises:
        typer.BadParameter: It is not a finite number.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


# What a number may be at most is far above any sensible use, and below what hangs, crashes or fills the memory.
MAX_SEED = 2**32 - 1  # NumPy's and Keras's
MAX_THREADS = 256
MAX_BATCH = 4096
MAX_IMAGES = 1_000_000
MAX_DEVICE = 255
_LARGEST_NUMBER = 3.4e38  # within float32
WAITS = ("spin", "sleep")  # while a GPU works
Seed = Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of every random choice.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=MAX_BATCH, help="Images a request.")]
Threads = Annotated[
    Optional[int],
    typer.Option(
        "--threads",
        min=1,
        max=MAX_THREADS,
        help="Threads that decode images; default: one a processor.",
        show_default=False,
    ),
]
Slots = Annotated[
    Optional[int],
    typer.Option(
        "--slots",
        min=1,
        max=64,
        help="GPU: batches in flight at once; default: 2, and 1 for cameras and in bench.",
        show_default=False,
    ),
]
Graph = Annotated[
    Optional[bool],
    typer.Option(
        "--graph/--no-graph",
        help="GPU: replay CUDA graphs; default: where they can be captured.",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    Optional[str],
    typer.Option(
        "--gpu-memory",
        metavar="KIND",
        help="GPU: copy to memory of the device, let it read mapped host memory, or auto: measure which is faster "
        "where they are one; default: auto.",
        show_default=False,
    ),
]
Wait = Annotated[
    Optional[str],
    typer.Option(
        "--wait", metavar="HOW", help="GPU: spin or sleep while it works; default: spin.", show_default=False
    ),
]
Device = Annotated[
    Optional[int],
    typer.Option(
        "--device",
        min=0,
        max=MAX_DEVICE,
        help="GPU: which one, as CUDA numbers them; default: 0.",
        show_default=False,
    ),
]
Server = Annotated[
    Optional[str],
    typer.Option(
        "--server",
        metavar="ADDRESS",
        help="A model on a Triton server, grpc://HOST:8001/MODEL: it runs there.",
        show_default=False,
    ),
]
Threshold = Annotated[
    Optional[list[str]],
    typer.Option(
        "--threshold",
        metavar="CLASS=P",
        help="Call this class wherever its probability reaches P, however probable another is. Repeatable.",
        show_default=False,
    ),
]
Abstain = Annotated[
    Optional[float],
    typer.Option(
        "--abstain",
        min=0,
        max=1,
        callback=finite,
        metavar="P",
        help="Call no class where the most probable one is below P, such as 0.6.",
        show_default=False,
    ),
]
Cam = Annotated[
    bool,
    typer.Option(
        "--cam", help="Show where the evidence for the class lies; needs an engine of build-engine --cam."
    ),
]
Engine = Annotated[Path, typer.Argument(help="An engine that build-engine wrote.", show_default=False)]


@dataclass(frozen=True, kw_only=True)
class Running:
    """How engines of a GPU were asked to run; None was not asked for.

    Attributes:
        slots: Batches in flight at once.
        graph: Whether CUDA graphs are replayed.
        memory: A kind of memory.
        wait: One of :data:`WAITS`.
        device: Which GPU.
    """

    slots: int | None = None
    graph: bool | None = None
    memory: str | None = None
    wait: str | None = None
    device: int | None = None


def running_options(engines: Sequence[Path | ServedModel], asked: Running) -> RunnerOptions:
    """Return how engines of a GPU are to run, what was not asked for as it is by default.

    Raises:
        ArtefactError: An engine has no readable record.
        UsageError: A word that is none of the choices, or an engine that runs on the processor or on a server.
    """
    from engines.record import peek_record
    from engines.runtimes import DEFAULT_OPTIONS, MEMORY_KINDS, get_runtime, refuse_on_processor

    options = {"memory": "--gpu-memory"}
    given = [options.get(name, f"--{name}") for name, value in vars(asked).items() if value is not None]
    if not given:
        return DEFAULT_OPTIONS
    for name, value, choices in (
        ("--gpu-memory", asked.memory, MEMORY_KINDS),
        ("--wait", asked.wait, WAITS),
    ):
        if value is not None and value not in choices:
            raise UsageError(f"{name} {value!r} is no choice", remedy=f"choose one of {', '.join(choices)}")
    for engine in engines:
        if not isinstance(engine, Path):
            raise UsageError(
                f"{engine} runs on its server: {given[0]} is for a GPU here", remedy="leave it out"
            )
        refuse_on_processor(get_runtime(peek_record(engine).runtime), given, engine)
    return replace(
        DEFAULT_OPTIONS,
        slots=asked.slots,
        graph=asked.graph is not False,
        memory=asked.memory or DEFAULT_OPTIONS.memory,
        blocking_wait=asked.wait == "sleep",
        device=asked.device or 0,
    )


def model_of(model: Path) -> Path:
    """Return the ONNX model of a run folder, or the path itself when it is a file."""
    return model / "model.onnx" if model.is_dir() else model


def parse_batch(text: str) -> BatchRange:
    """Read ``8`` or ``1:8:32`` (smallest, best, largest).

    Raises:
        UsageError: Anything else, or more than 4096.
    """
    from engines.record import BatchRange

    remedy = f"write N or MIN:OPT:MAX, such as --batch 1:8:32, {MAX_BATCH} at most"
    try:
        if not re.fullmatch("[0-9]{1,4}(:[0-9]{1,4}){0,2}", text) or int(text.rpartition(":")[2]) > MAX_BATCH:
            raise ValueError
        sizes = [int(part) for part in text.split(":")]
        if len(sizes) == 1:
            return BatchRange(sizes[0], sizes[0], sizes[0])
        smallest, best, largest = sizes
        return BatchRange(smallest, best, largest)
    except ValueError as error:
        raise UsageError(f"--batch {text!r} is no batch range", remedy=remedy) from error


def parse_fold(text: str | None) -> tuple[int, int] | None:
    """Read ``K/N``, such as ``2/5``.

    Raises:
        UsageError: Anything else.
    """
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,3}/[0-9]{1,3}", text):
        raise UsageError(f"--fold {text!r} is no fold", remedy="write K/N, such as --fold 2/5")
    number, _, folds = text.partition("/")
    return int(number), int(folds)


def parse_thresholds(texts: Sequence[str] | None) -> dict[str, float]:
    """Read ``covid19=0.3`` and its like; a class may have ``=`` in its name.

    Raises:
        UsageError: Anything else, or a class twice.
    """
    found: dict[str, float] = {}
    for text in texts or ():
        name, _, number = text.rpartition("=")
        if not re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,9}", number) or not name or name in found:
            raise UsageError(
                f"--threshold {text!r} is no threshold{' but the second one' if name in found else ''}",
                remedy="write CLASS=P, each class once, such as --threshold covid19=0.3",
            )
        found[name] = float(number)
    return found


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Read ``0.485,0.456,0.406``, or ``1/255``.

    Raises:
        UsageError: Anything else, or a number that float32 does not hold.
    """
    found = []
    for part in text.split(","):
        try:
            above, _, below = part.partition("/")
            value = float(above) / float(below or 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not abs(value) <= _LARGEST_NUMBER:
            raise UsageError(
                f"{option} {text!r} is no number", remedy=f"write it such as {option} 0.5 or 1/255"
            )
        found.append(value)
    return tuple(found)


def parse_size(text: str) -> tuple[int, int]:
    """Read ``224``, or ``HEIGHTxWIDTH`` such as ``224x320``.

    Raises:
        UsageError: Anything else.
    """
    if not re.fullmatch("[0-9]{1,4}(x[0-9]{1,4})?", text):
        raise UsageError(f"--size {text!r} is no size", remedy="write --size 224 or --size HEIGHTxWIDTH")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def parse_precision(*, precision: str | None, fp32: bool, fp16: bool, int8: bool) -> Precision:
    """Return the one precision that was asked for, by name or by flag; FP32 without either.

    Raises:
        UsageError: More than one.
    """
    from engines.record import Precision

    asked = [
        p for p, flag in ((Precision.FP32, fp32), (Precision.FP16, fp16), (Precision.INT8, int8)) if flag
    ]
    words = [f"--{p.value}" for p in asked]
    if precision is not None:
        asked.append(Precision(precision))
        words.append(f"--precision {precision}")
    if len(set(asked)) > 1:
        raise UsageError(
            f"{' and '.join(words)} exclude each other",
            remedy="build one engine a precision",
        )
    return asked[0] if asked else Precision.FP32


def parse_gate(validate: Path | None, max_drop: float | None) -> GateOptions | None:
    """Return the accuracy gate that was asked for, or None.

    Raises:
        UsageError: A budget without images.
    """
    from edge_dsc.build.gate import DEFAULT_MAX_DROP, GateOptions

    if validate is None:
        if max_drop is not None:
            raise UsageError("--max-drop needs images to measure the drop on", remedy="add --validate DIR")
        return None
    return GateOptions(data=validate, max_drop=DEFAULT_MAX_DROP if max_drop is None else max_drop)
