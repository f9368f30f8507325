"""The two ways in which a command of this project ends badly, each said in one line."""


class UserError(Exception):
    """A mistake in usage, configuration or input: what is wrong, where, and what to do. Exit code 2."""


class RunFailed(Exception):
    """A run that started well and could not be finished: what failed, and what to do. Exit code 1."""
