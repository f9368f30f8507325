"""Studies: every table and figure is rows by columns from one YAML file, trained as Ray trials, measured and drawn.

definition.py reads a study; trained.py trains a column of it and hands its cells to one of the kinds of measurement:
accuracy.py, losses.py, finetuning.py, correlation.py, whole.py. `pipeline/study.py` is the command.
"""
