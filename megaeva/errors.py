"""Errors a user can cause. The command line prints their text without a traceback and exits with 2.

Every message has three parts: what is (path = value, file:line), what must be, what to do.
"""


class UserError(Exception):
    """A mistake in a recipe, a file, the data or the installation, explained to its author."""


class ConfigError(UserError):
    """A recipe that cannot be run; carries every problem found, one per line."""


class DataError(UserError):
    """Shards, captions or images that cannot be trained on."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""
