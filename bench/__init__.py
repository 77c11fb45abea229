"""From any callable to latency samples, a report and a comparison. Knows nothing of GPUs or runtimes."""
