"""The error type for mistakes that the user can fix."""


class UsageError(ValueError):
    """Error with a message for the user, such as a wrong config key or a damaged file.

    The message names the file, key or image and says how to fix it. The command line prints the
    message without a traceback.
    """
