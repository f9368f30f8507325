"""The report: its page, its pictures, and the paper's results beside ours."""
