"""The experiment: a file a DVC stage, and what they share (params, trial, cluster, tracking)."""
