"""Errors that a user can cause. Each message names the place, the value, the rule and the way out."""


class Fp4DistError(ValueError):
    """Base of every error that fp4dist raises on purpose. `exit_code` is what a program that it ends returns."""

    exit_code = 2


class ConfigError(Fp4DistError):
    """A configuration (run, recipe, model) is wrong; the message starts with the path of the key."""


class KernelUnavailable(Fp4DistError):
    """No backend can run an operation; the message lists each backend's reason."""


class RecipeMismatch(Fp4DistError):
    """A recipe and a model do not fit: a rule matches nothing, a size does not divide, FP4 asked for and not got."""


class DataError(Fp4DistError):
    """A data file is missing, empty, truncated or does not fit the model."""


class CheckpointError(Fp4DistError):
    """A checkpoint is missing, unreadable or belongs to another model or recipe."""


class DependencyError(Fp4DistError):
    """A package is missing, too old, or is an unrelated package of the same name."""


class EnvironmentMismatch(Fp4DistError):
    """Ranks of one job see different environment variables, or not those that the launcher set."""

    exit_code = 22  # preflight's class for this fault


class TrainingDiverged(Fp4DistError):
    """Too many non-finite steps in a row; the last good checkpoint is kept."""


class WireError(Fp4DistError):
    """A record from another rank is damaged or is not what this rank expects; names rank, bucket and record."""

    exit_code = 24
