"""From a trained run to an engine: export, fine-tuning for INT8, calibration, graph, mixed precision, gate, record."""
