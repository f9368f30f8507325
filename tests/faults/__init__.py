"""Real faults, and what was kept: `make faults`."""
