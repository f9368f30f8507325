"""Speed against the machine's floors: `python -m benchmarks.training`, `.prediction`, `.gpu`."""
