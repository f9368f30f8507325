"""MLflow: the runs, the registered model, and what serves it."""
