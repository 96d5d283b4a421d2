"""The two kinds of failure that the command line tells apart."""


class UserError(Exception):
    """Unusable configuration or input: one line that names the file and the key. Exit code 2, no traceback."""


class TrainingError(Exception):
    """The run itself cannot go on (too many skipped steps, an engine that died). Exit code 1."""
