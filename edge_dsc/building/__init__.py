"""From a model to an engine: calibration, the graph for a runtime, mixed precision, the record."""
