"""The errors a caller may want to tell apart.

Every message says what was given, what is needed and what to do.
"""


class TenfoldError(Exception):
    """Base of all errors that are the user's to mend; the command line prints them without a traceback."""


class ConfigError(TenfoldError):
    """An experiment file, an override or an option is wrong."""


class DataError(TenfoldError):
    """A data file is missing, empty, or holds a row that cannot be used."""


class ModelError(TenfoldError):
    """A model or tokenizer is missing, damaged, or does not fit what it is used for."""


class CheckpointError(TenfoldError):
    """No usable checkpoint, or one that does not fit this run."""


class ClusterError(TenfoldError):
    """The cluster cannot be reached, or lacks what the run asks for."""


class TrackingError(TenfoldError):
    """The MLflow tracking server cannot be used."""


class StorageError(TenfoldError):
    """The run's storage did not answer for as long as we wait."""
