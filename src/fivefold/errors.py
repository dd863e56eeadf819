"""Every error Fivefold raises on purpose: one sentence that names the value and the remedy.

The command line prints the sentence and exits with code 2; a library user catches the type.
"""


class FivefoldError(Exception):
    """Base of all errors raised on purpose."""


class RecipeError(FivefoldError, ValueError):
    """A recipe that cannot be parsed, has a bad value, or combines methods that exclude each other."""


class UnsupportedModelError(FivefoldError):
    """A model family or setting that Fivefold does not (yet) attend for correctly."""


class CacheStateError(FivefoldError, RuntimeError):
    """A call that the cache cannot honour without becoming wrong (wrong attention, crop too deep, ...)."""


class CacheFullError(FivefoldError, MemoryError):
    """The byte cap is reached; nothing was stored and every sequence is as it was before the call."""


class NonFiniteError(FivefoldError, ValueError):
    """Keys or values hold infinities or NaN, or are beyond what a page can hold."""


class ProfileError(FivefoldError):
    """A calibration profile that is missing, damaged, or belongs to another model or version."""


class SavedCacheError(FivefoldError):
    """A saved cache that is missing, damaged, newer, or belongs to another model or recipe."""


class ModelUnavailableError(FivefoldError):
    """The embedded model is not on this machine, or could not be brought here."""


class CodecError(FivefoldError, TypeError):
    """A codec of one's own that does not fill the pages that it has laid out."""


class InputError(FivefoldError):
    """A file or option that the command line cannot use."""


class CompileError(FivefoldError, RuntimeError):
    """A kernel that cannot be compiled on this machine."""


class SlowPathWarning(UserWarning):
    """A cache works more slowly than this machine could: said once, with the reason, where it becomes known. What a
    cache does is in its `report()`; `warnings.simplefilter("ignore", fivefold.SlowPathWarning)` keeps it quiet."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without its full stop and short enough to quote in a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]
