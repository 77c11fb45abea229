"""The demo: the whole line on procedural chest phantoms."""

from __future__ import annotations

from edge_dsc.demo.rows import DemoResult
from edge_dsc.demo.walk import DemoPlan, run_demo

__all__ = ["DemoPlan", "DemoResult", "run_demo"]
