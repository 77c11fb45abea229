"""The model contract: what a network takes and gives, carried inside the ONNX file as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes

SCHEMA_VERSION = 1
METADATA_KEY = "edge_dsc.contract"
DECODE_RULE = "grey8-v1"  # engines.images.decode_grey
RESIZE_RULE = "halve-area-v1"  # engines.images.resize_to

_EXPORT_AGAIN = "export it again: edge-dsc export RUN"


class ModelContract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an image must become before the network sees it, and what the answers mean.

    Attributes:
        labels: Class names, in the order of the network's outputs.
        architecture: ``dsc`` or ``cnn``, or another name that the exporter gave.
        input_name: Name of the graph's input tensor.
        output_name: Name of the graph's output tensor, ``float32 [N, len(labels)]``, probabilities.
        height: Input height in pixels.
        width: Input width in pixels.
        dtype: Element type of the input.
        layout: Axis order; with the one grey channel NHWC and NCHW are the same bytes.
        decode: Name of the rule that turns a file into 8-bit grey pixels.
        resize: Name of the rule that brings those pixels to ``height`` x ``width``.
        scale: Factor on the pixel values; it is folded into the first layer's weights, so callers
            hand over raw 0..255 and must not apply it.
        schema_version: Version of this description.
    """

    labels: tuple[str, ...]
    architecture: str
    input_name: str = "image"
    output_name: str = "probabilities"
    height: int = 224
    width: int = 224
    dtype: str = "uint8"
    layout: str = "NHWC"
    decode: str = DECODE_RULE
    resize: str = RESIZE_RULE
    scale: float = 1 / 255
    schema_version: int = SCHEMA_VERSION

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input without the batch: ``(height, width, 1)``."""
        return (self.height, self.width, 1)

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
            contract = msgspec.convert(json.loads(text), cls, strict=True)
        except ValueError as error:  # msgspec's own is one, too
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
        known = {
            "schema_version": SCHEMA_VERSION,
            "decode": DECODE_RULE,
            "resize": RESIZE_RULE,
            "dtype": "uint8",
            "layout": "NHWC",
        }
        for name, expected in known.items():
            seen = getattr(self, name)
            if seen != expected:
                raise ArtefactError(
                    f"{source} asks for {name} {seen!r}, this edge-dsc knows {expected!r}",
                    remedy=_EXPORT_AGAIN,
                )
