"""What can go wrong, each with one sentence that says where and what to do next."""


class MicelabError(Exception):
    """Base of every error that micelab raises on purpose; the command line prints its text and exits with 2.

    >>> import micelab
    >>> try:
    ...     micelab.convert(micelab.small_cnn(activation="quant_clip"), method="mise")
    ... except micelab.MicelabError as error:
    ...     print(str(error).split(":")[0])
    method 'mise' is unknown
    """


class InputError(MicelabError, ValueError):
    """A value, shape or option is out of its range."""


class ConversionError(MicelabError):
    """The network holds something that has no spiking counterpart here; the text names the layer."""


class DataError(MicelabError):
    """A data set, folder or image cannot be used; the text names the file."""


class CheckpointError(MicelabError):
    """A checkpoint is missing, damaged or of another network; the text names the file."""


class TrainingError(MicelabError):
    """Training stopped by itself (the loss is no longer finite, say); the last good checkpoint is kept."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
