"""MLflow: runs, the registered model, and serving it."""
