"""Studies: each is a table or figure of rows by columns, described by a YAML file, trained, measured and drawn.

definition.py reads a study. trained.py trains one of its columns, and gives the cells to the module for what the study
measures: accuracy.py, losses.py, finetuning.py, correlation.py or whole_set.py. `pipeline/study.py` is the command.
"""
