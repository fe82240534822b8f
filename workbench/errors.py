"""The one exception that a user of the workbench is meant to read."""


class WorkbenchError(ValueError):
    """Bad input, said in one sentence: what was wrong, and what to do about it."""
