"""MLflow: runs, datasets, the registered model, and serving it.

Which metrics of a training it shows: `METRICS` in `pipeline/runs/progress.py`. Of a test: `evaluation.py`, here.
"""
