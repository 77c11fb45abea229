"""edge-dsc: bring a small X-ray classifier onto an NVIDIA Jetson and prove what it is worth there.

Research and engineering only: this is not a medical device.
"""

from pathlib import Path

__version__ = "0.1.0"

# The folder that the packages are imported from: processes of ours start there, because ``python -m`` imports from the
# current folder first, where the user may keep a json.py or a bench.py.
IMPORTED_FROM = Path(__file__).resolve().parents[1]
