"""The experiment: a file a DVC stage, and what they share (params, trial, cluster, tracking)."""

import os
import secrets

# Here, since MLflow and Ray look when they are imported. No telemetry unless the user asks for it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not os.environ.get("RAY_ADDRESS"):  # a Ray of our own: its ports are open to the network, to those with the token
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
