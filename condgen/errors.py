"""Errors a user can act on. Each message says what was given, what is allowed and what to try.

The class decides the exit code that the commands return (`docs/usage.md`, "Exit codes").
"""


class CondgenError(Exception):
    """Base of every error that condgen raises on purpose."""

    exit_code = 1


class ConfigError(CondgenError):
    """The configuration cannot be run: unknown key, wrong type, condition that nothing provides."""

    exit_code = 2


class DataError(CondgenError):
    """A row, a file or a whole data set cannot be used."""

    exit_code = 3


class ShapeError(DataError, ValueError):
    """A tensor has the wrong rank, size, dtype or value range."""


class DivergedError(CondgenError):
    """A loss or a gradient stopped being finite, or the output stopped depending on its condition."""

    exit_code = 4


class CheckpointError(CondgenError):
    """A checkpoint is missing, damaged or does not fit the system."""

    exit_code = 2


class Stopped(CondgenError):
    """A signal asked the run to end; a checkpoint was written and the run can be resumed."""

    exit_code = 75
