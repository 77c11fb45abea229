"""From a trained run to the deployed ONNX model."""

from __future__ import annotations

from edge_dsc.export.run import ExportResult, export_run

__all__ = ["ExportResult", "export_run"]
