"""The experiment: one file for each DVC stage, and what the stages have in common."""

import os
import secrets

# No telemetry unless the user asks for it. Set here, since MLflow and Ray read it when they are imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not os.environ.get("RAY_ADDRESS"):  # our own Ray: its ports are open to the network, so it asks for a token
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
