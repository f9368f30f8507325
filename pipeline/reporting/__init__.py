"""The report: its page, its figures, and the paper's own figures beside them."""
