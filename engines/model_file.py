"""Reading an exported ONNX model: whole, consistent, ours, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines import packages
from engines.contract import ModelContract
from engines.errors import ArtefactError

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

LARGEST_MODEL = 512 << 20  # bytes; ours have a few MB, and protobuf itself ends at 2 GiB

_Value = tuple[str, int, tuple[int, ...]]  # name, element type, shape without the batch
_EXPORT_AGAIN = "export it again: edge-dsc export RUN"


def load_model(path: Path) -> ModelProto:
    """Read an exported ONNX model and check that it is one of ours, whole and consistent.

    Raises:
        ArtefactError: Missing, too large, not ONNX, damaged, with tensors in other files, or without a
            contract that its own inputs and outputs keep.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_MODEL:
            raise ArtefactError(
                f"{path} has {size} bytes, a model of ours at most {LARGEST_MODEL}", remedy=_EXPORT_AGAIN
            )
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}", remedy=_EXPORT_AGAIN) from error
    return parse_model(data, str(path))


def parse_model(data: bytes, source: str) -> ModelProto:
    """Do what :func:`load_model` does for a model that is already in memory.

    Args:
        data: A serialised ``ModelProto``.
        source: Name of the file, for the error text.

    Raises:
        ArtefactError: As :func:`load_model`.
    """
    onnx = packages.load("onnx")
    decode_error = packages.load("google.protobuf.message").DecodeError
    try:
        model = onnx.load_model_from_string(data)
    except decode_error as error:
        raise ArtefactError(f"{source} is not an ONNX model: {error}", remedy=_EXPORT_AGAIN) from error
    if not model.graph.node:
        raise ArtefactError(f"{source} is not an ONNX model: no nodes inside", remedy=_EXPORT_AGAIN)
    for tensor in model.graph.initializer:
        if tensor.external_data or tensor.data_location:
            raise ArtefactError(f"{source} keeps {tensor.name} in another file", remedy=_EXPORT_AGAIN)
    contract_of(model, source)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtefactError(f"{source} is not a valid ONNX model: {reason}", remedy=_EXPORT_AGAIN) from error
    return model


def contract_of(model: ModelProto, source: str) -> ModelContract:
    """Return the contract that a model carries, checked against its inputs and outputs.

    Raises:
        ArtefactError: No contract, or inputs and outputs that do not keep it.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    contract = ModelContract.from_metadata(metadata, source=source)
    types = packages.load("onnx").TensorProto
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    seen = (_describe(inputs), _describe(model.graph.output))
    expected = (
        [(contract.input_name, types.UINT8, contract.input_shape)],
        [(contract.output_name, types.FLOAT, (len(contract.labels),))],
    )
    if seen != expected:
        raise ArtefactError(
            f"{source} takes {_words(seen[0])} and gives {_words(seen[1])}; "
            f"its contract says {_words(expected[0])} and {_words(expected[1])}",
            remedy=_EXPORT_AGAIN,
        )
    return contract


def _describe(values: Iterable[ValueInfoProto]) -> list[_Value]:
    """Name, element type and shape without the batch (0 where dynamic) of graph inputs or outputs."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        found.append((value.name, tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim[1:])))
    return found


def _words(values: Sequence[_Value]) -> str:
    element = packages.load("onnx").TensorProto.DataType.Name
    return ", ".join(
        f"{name} {element(kind).lower()} [N, {str(list(shape))[1:]}" for name, kind, shape in values
    )
