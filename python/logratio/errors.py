"""The base class of every exception that logratio defines."""


class LogratioError(Exception):
    """Base of all of logratio's own exceptions: catch this one to catch them all.

    Each exception also derives from the built-in class that fits it (`ValueError`, `OSError` …).
    """
