"""The only error whose message is for users and not for developers."""


class UserError(Exception):
    """A mistake that the user can correct.

    The message says what is wrong, with the value and the file, and then what to type. The commands show only the message,
    without a traceback.
    """
