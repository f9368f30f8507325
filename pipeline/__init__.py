"""The experiment: one file for each DVC stage, and what the stages have in common."""

import os
import secrets
import sys
from importlib.util import find_spec

if lacking := [name for name in ("ray", "mlflow") if find_spec(name) is None]:
    print(
        f"error: the experiment needs {' and '.join(lacking)}; run `make setup`, then `source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

# No telemetry unless the user asks for it. Set here, since MLflow and Ray read it when they are imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not os.environ.get("RAY_ADDRESS"):  # our own Ray: its ports are open to the network, so it asks for a token
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
