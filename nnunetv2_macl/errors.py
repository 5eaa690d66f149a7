"""The one error that speaks to the user rather than to a developer."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message says what is wrong, with the value and the file, and then what to type. It is shown as it is, without a
    traceback.
    """
