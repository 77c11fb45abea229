"""Latency reports and comparisons as self-contained HTML pages, and the pictures of training and calibration.

``charts`` draws the plots of a page, ``document`` puts it together, ``figures`` draws PNG files. Importing this package
loads none of them.
"""

from importlib.resources import files

CSS = files(__name__).joinpath("style.css").read_text(encoding="utf-8")
"""Style sheet of every page; colours are variables with a light and a dark value."""
