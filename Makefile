# Each target works by itself on a new machine that has Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

DOCS := .venv-docs

.PHONY: setup repro test faults gpu lint ui docs notebook

repro: $(READY)
	$(IN_VENV) dvc repro
	@$(IN_VENV) python -m pipeline.answer

# The virtual environment .venv, with everything that the project needs.
setup: $(READY)

# On a processor with AVX-512, the numeric tests run a second time with the kernels that torch uses on one without.
# Only their files are imported then.
NUMERIC := -m numeric $$(grep -l mark.numeric tests/test_*.py)
WITHOUT_AVX512 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/kernels-avx2
# Two tests share the cores: a thread that spins while it waits for others would take the other test's.
PYTEST := OMP_WAIT_POLICY=PASSIVE python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	! grep -qs avx512 /proc/cpuinfo || $(IN_VENV) $(WITHOUT_AVX512) $(PYTEST) $(NUMERIC)
	$(IN_VENV) $(PYTEST)

# Tests with real failures: killed processes, full disks, lost servers and nodes. Some need root.
faults: $(READY)
	$(IN_VENV) python -m pytest tests/faults --durations=0 -o timeout=3600

# What a GPU can do: tests, speed, training at the paper's scale, and a small search, training and evaluation by Ray.
# Without a GPU it says so and stops.
gpu: $(READY)
	$(IN_VENV) python -m benchmarks.gpu

lint: $(READY)
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) lint-imports --no-cache

# The documentation, as site/index.html. A link, an anchor or a name of the code that is not there is an error.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "docs: site/index.html"

# The notebook is made from the script, and run.
notebook: $(READY)
	$(IN_VENV) jupytext --to ipynb --set-kernel python3 examples/quickstart.py
	$(IN_VENV) jupyter execute --inplace examples/quickstart.ipynb

# MLflow's UI on this project's database, for this machine only. One worker and no job queue, so it starts in seconds.
# Without `workflowType`, a browser that has not been there before shows the pages for language models.
ui: $(READY)
	@$(IN_VENV) python -c "from pipeline.tracking.database import follow_move, tracking_uri; follow_move(tracking_uri())"
	@echo "runs: http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning (of other settings: 2, 3, ...)"
	$(IN_VENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
		mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db --workers 1

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# It reads the code without importing it, so torch is not needed: of all packages, only those of the extra `docs`.
EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c '$(EXTRA)')
	touch $@
