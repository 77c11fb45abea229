"""Refuses a setuptools that does not read pyproject.toml as it stands; everything else is said there."""

import setuptools

# Ubuntu 22.04's pip 22.0.2 may build with its own setuptools 59.6, which would install "UNKNOWN-0.0.0".
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"edge-dsc needs setuptools 77 or newer to be installed, not {setuptools.__version__}: "
        "python -m pip install -U pip setuptools, then install again"
    )
setuptools.setup()
