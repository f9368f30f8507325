"""Studies: each is a table or figure of rows by columns, described by a YAML file, trained, measured and drawn.

definition.py reads a study, and running.py runs it: trained.py trains one of its columns, and gives the cells to the
module for what the study measures, which is accuracy.py, losses.py, finetuning.py, correlation.py or whole_set.py.
columns.py makes params and trials of its columns and rows. measuring.py measures cells, and tasks/ is what Ray runs for
that. figures.py draws, page.py writes. `pipeline/study.py` is the command.
"""
