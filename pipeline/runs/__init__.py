"""Trials and measurements: what a process runs, Ray that runs many, and what is kept of them."""
