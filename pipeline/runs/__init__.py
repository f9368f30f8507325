"""Runs trials (trainings) and measurements with Ray, many at a time, and keeps their results."""

import os

# Ray reads these when it is imported, and only the modules of this package import it.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # nothing reads Ray's own report files
# With Tune's own handler, Ctrl-C would end the search as if it were finished; it should interrupt the stage.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our callback prints more than its boxes
os.environ.setdefault("RAY_task_oom_retries", "2")  # else a measurement that needs too much memory is retried for ever
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that diverged gives ASHA no accuracy
