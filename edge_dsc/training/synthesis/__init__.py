"""Synthetic X-rays of one class: the networks and their step, the run that learns and writes, what they are worth."""
