"""The one exception whose message is written for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message is one line that names the file or flag, the value, and what would fit.

    Scripts print it without a traceback and exit with status 2.
    """
