"""Options that several commands share, spelled the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one versioned JSON object; everything else to stderr.")
]
Out = Annotated[Optional[Path], typer.Option("--out", help="Where to write.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Threads = Annotated[
    Optional[int],
    typer.Option(
        "--threads", min=1, help="Threads that decode images; default: one a processor.", show_default=False
    ),
]
RunFolder = Annotated[
    Path, typer.Argument(help="A run folder that train wrote, or an ONNX model.", show_default=False)
]
Engine = Annotated[Path, typer.Argument(help="An engine that build-engine wrote.", show_default=False)]


def model_of(model: Path) -> Path:
    """Return the ONNX model of a run folder, or the path itself when it is a file."""
    return model / "model.onnx" if model.is_dir() else model
