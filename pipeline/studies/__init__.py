"""Studies: each is a table or figure of rows by columns, described by a YAML file, trained, measured and drawn.

definition.py reads a study, and running.py runs it: workspace.py prepares a column's data, and trained.py trains the
column and gives the cells to the module for what the study measures, which is accuracy.py, losses.py, finetuning.py,
correlation.py or whole_set.py. columns.py makes params and trials of its columns and rows. cells.py measures cells, and
tasks/ has what Ray runs for that. figures.py draws, page.py writes. `pipeline/study.py` is the command.
"""
