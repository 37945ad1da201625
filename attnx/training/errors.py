"""What can go wrong in a way that is not a bug; ``exit_code`` is what a command ends with."""


class DataError(Exception):
    """Text that cannot be read or is too little."""

    exit_code = 2


class TrainingError(Exception):
    """A run that cannot go on: a loss that is not finite, or a checkpoint that cannot be written or read."""

    exit_code = 1
