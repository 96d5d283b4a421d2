"""The two kinds of failure that the command line distinguishes."""


class UserError(Exception):
    """Unusable configuration or input; its message is one line naming file and key. Exit code 2, no traceback."""


class TrainingError(Exception):
    """The run itself cannot continue (too many skipped steps, a dead engine). Exit code 1."""
