"""Engines as subjects of bench: single requests, scenarios, passes of their own, comparisons of reports."""
