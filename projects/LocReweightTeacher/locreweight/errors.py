"""The one exception for everything that a user can put right: data, config, command line."""


class UsageError(ValueError):
    """Says which file, key or image is at fault and the way out; the command line shows just it."""
