"""edge-dsc: bring a small X-ray classifier onto an NVIDIA Jetson and prove what it is worth there.

Research and engineering only: this is not a medical device.
"""

__version__ = "0.1.0"
