"""Hand engines over to what others run already: a server, a fleet of devices, a video pipeline."""
