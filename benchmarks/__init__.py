"""Speed against the machine's floors: `python -m benchmarks.training`, `python -m benchmarks.prediction`."""
