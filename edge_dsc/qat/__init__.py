"""Quantisation-aware fine-tuning: the deployed network learns to live with INT8."""

from __future__ import annotations

from edge_dsc.qat.run import QatOptions, QatResult, fine_tune

__all__ = ["QatOptions", "QatResult", "fine_tune"]
