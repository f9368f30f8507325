"""MLflow: runs, datasets, the registered model, and serving it.

Which metrics of a training it shows: `METRICS` in `pipeline/runs/trial_log.py`. Of a test: `evaluation.py`, here.
"""
