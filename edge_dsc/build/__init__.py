"""From a trained run to an engine: export, fine-tuning for INT8, calibration, the graph, mixed precision, the gate, the record."""
