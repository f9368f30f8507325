"""Studies: each is a table or figure of rows by columns, described by a YAML file, trained, measured and drawn.

definition.py reads a study, and running.py runs it: trained.py trains one of its columns, and gives the cells to the
module for what the study measures, which is accuracy.py, losses.py, finetuning.py, correlation.py or whole_set.py.
measuring.py opens and measures cells for them. `pipeline/study.py` is the command.
"""
