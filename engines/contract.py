"""The model contract: what a network takes and gives, carried inside the ONNX file as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes

SCHEMA_VERSION = 2
METADATA_KEY = "edge_dsc.contract"
DECODE_RULE = "grey8-v1"  # engines.images.decode_image, one channel
COLOUR_RULE = "rgb8-v1"  # the same with three channels, red first
NVJPEG_RULE = "grey8-nvjpeg-v1"  # grey8-v1 but for JPEGs, which engines.trt.nvjpeg decodes
DECODERS = {"opencv": DECODE_RULE, "nvjpeg": NVJPEG_RULE}  # by their names on the command line
RESIZE_RULE = "halve-area-v1"  # engines.images.resize_to
BORDERED_RULE = "halve-area-bordered-v1"  # the same with a black border, one pixel wide, around it
INPUT_TYPES = ("uint8", "int8", "float16")  # engines.images.shape_input
CAM_OUTPUT = "cam"  # the second output of an engine with class activation maps

LARGEST_MODEL = 512 << 20  # bytes; ours have a few MB, and protobuf itself ends at 2 GiB
_LARGEST_CONTRACT = 1 << 20  # characters
_EXPORT_AGAIN = "export it again: edge-dsc export RUN"

# What documents hold. A file may come from a stranger: what becomes part of a path has no separators, what is shown
# no control characters and no halves of characters, and every number has a range.
_SHOWN = r"\A[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*\Z"
Text: TypeAlias = Annotated[str, Meta(max_length=1000, pattern=_SHOWN)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200, pattern=_SHOWN)]
PathName: TypeAlias = Annotated[str, Meta(max_length=64, pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Sha256: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Labels: TypeAlias = Annotated[tuple[Name, ...], Meta(min_length=2, max_length=1000)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40)]
Seed: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Number: TypeAlias = Annotated[float, Meta(ge=-3.4e38, le=3.4e38)]  # within float32
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e10)]
_Side: TypeAlias = Annotated[int, Meta(ge=1, le=4096)]
_Rule: TypeAlias = Annotated[str, Meta(max_length=64)]


class ModelContract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an image must become before the network sees it, and what the answers mean.

    Attributes:
        labels: Class names, in the order of the network's outputs.
        architecture: ``dsc`` or ``cnn``, or another name that the exporter gave; engines are named after it.
        input_name: Name of the graph's input tensor.
        output_name: Name of the graph's output tensor, ``float32 [N, len(labels)]``, probabilities.
        height: Input height in pixels.
        width: Input width in pixels.
        dtype: Element type of the input: ``uint8`` or ``float16``, 0..255 as they are; ``int8``, minus 128.
        layout: Axis order; with one grey channel NHWC and NCHW are the same bytes.
        decode: Name of the rule that turns a file into 8-bit pixels: ``grey8-v1``, ``rgb8-v1``, ``grey8-nvjpeg-v1``.
        resize: Name of the rule that brings those pixels to ``height`` x ``width``.
        scale: Factor on the grey values; it is folded into the first layer's weights, so callers
            must not apply it.
        temperature: What the logits are divided by before softmax, so that the probabilities mean what they say;
            :func:`edge_dsc.infer.classify.calibrate_probabilities` applies it to the graph's output. 1 changes nothing.
        cam: Height and width of the class activation maps that an engine gives as its second output,
            :data:`CAM_OUTPUT`, ``float32 [N, len(labels), height, width]``; None where it gives none.
        schema_version: Version of this description; version 1 knew neither ``temperature`` nor ``cam``.

    Raises:
        ValueError: Two labels are the same.
    """

    labels: Labels
    architecture: PathName
    input_name: Name = "image"
    output_name: Name = "probabilities"
    height: _Side = 224
    width: _Side = 224
    dtype: _Rule = "uint8"
    layout: _Rule = "NHWC"
    decode: _Rule = DECODE_RULE
    resize: _Rule = RESIZE_RULE
    scale: Annotated[float, Meta(gt=0, le=65536)] = 1 / 255
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    cam: tuple[_Side, _Side] | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Check that no class is named twice."""
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a class is named twice")

    @property
    def border(self) -> int:
        """Pixels of black on each side of the resized picture; they are part of the input."""
        return 1 if self.resize == BORDERED_RULE else 0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input without the batch, with its border: ``(height, width, channels)``, or channels first."""
        sides = (self.height + 2 * self.border, self.width + 2 * self.border)
        return (*sides, self.channels) if self.layout == "NHWC" else (self.channels, *sides)

    @property
    def outputs(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape without the batch of each output, ``float32``: the probabilities, and the maps if any."""
        classes = len(self.labels)
        maps = [] if self.cam is None else [(CAM_OUTPUT, (classes, *self.cam))]
        return [(self.output_name, (classes,)), *maps]

    @property
    def channels(self) -> int:
        """Channels of the input, as the decode rule gives them: 1 grey, or 3 in the order red, green, blue."""
        return 3 if self.decode == COLOUR_RULE else 1

    def with_input(self, dtype: str, border: int = 0) -> ModelContract:
        """Return the contract of an engine of this model whose first convolution takes the input as it comes.

        Args:
            dtype: ``int8`` or ``float16``.
            border: What the convolution leaves to the host to pad with: 0 or 1.
        """
        resize = BORDERED_RULE if border else self.resize
        return msgspec.structs.replace(self, dtype=dtype, layout="NCHW", resize=resize)

    @property
    def preprocess_sha256(self) -> str:
        """Hash of all that decides the pixels the network sees; calibration ranges depend on it."""
        names = ("height", "width", "dtype", "layout", "decode", "resize", "scale")
        return sha256_bytes(canonical_json({name: getattr(self, name) for name in names}))

    def to_metadata(self) -> dict[str, str]:
        """Return the ONNX metadata properties that carry this contract."""
        return {METADATA_KEY: json.dumps(msgspec.to_builtins(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, source: str) -> ModelContract:
        """Read the contract out of an ONNX file's metadata properties.

        Raises:
            ArtefactError: The model carries no contract: it was not exported by edge-dsc.
        """
        text = metadata.get(METADATA_KEY)
        if text is None:
            raise ArtefactError(
                f"{source} was not exported by edge-dsc (no contract inside)", remedy=_EXPORT_AGAIN
            )
        try:
            if len(text) > _LARGEST_CONTRACT:
                raise ValueError(f"{len(text)} characters")
            contract = msgspec.convert(upgrade_contract(json.loads(text)), cls, strict=True)
        except (ValueError, RecursionError) as error:  # msgspec's own is a ValueError, too
            raise ArtefactError(
                f"{source} holds a damaged contract: {error}", remedy=_EXPORT_AGAIN
            ) from error
        contract.check(source)
        return contract

    def check(self, source: str) -> None:
        """Refuse a contract whose rules this code does not know.

        Raises:
            ArtefactError: Another schema version, decode or resize rule, dtype or layout.
        """
        known: dict[str, tuple[object, ...]] = {
            "schema_version": (SCHEMA_VERSION,),
            "decode": (DECODE_RULE, COLOUR_RULE, NVJPEG_RULE),
            "resize": (RESIZE_RULE, BORDERED_RULE),
            "dtype": INPUT_TYPES,
            "layout": ("NHWC", "NCHW"),
        }
        for name, values in known.items():
            seen = getattr(self, name)
            if seen not in values:
                raise ArtefactError(
                    f"{source} asks for {name} {seen!r}, this edge-dsc knows {' and '.join(map(repr, values))}",
                    remedy=_EXPORT_AGAIN,
                )


def upgrade_contract(body: Any) -> Any:
    """Make what an earlier version wrote the present form; anything else, damaged or later, stays as it is."""
    if isinstance(body, dict) and body.get("schema_version") == 1:
        return {**body, "schema_version": SCHEMA_VERSION}
    return body
