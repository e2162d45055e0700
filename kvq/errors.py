"""The exceptions a user of kvq may catch.

    KvqError
    ├── RecipeError            a recipe, codec or layer pattern that cannot work
    ├── UnsupportedModelError  a model whose cache kvq cannot quantize, with the reason
    ├── ModelNotFoundError     a model or data set that is not on disk and cannot be fetched
    ├── CheckpointError        an export, statistics or weight file that is missing, altered or not this model's
    ├── DataError              text or activations that cannot be used (too short, not finite)
    ├── CacheError             a cache operation that the packed state does not allow
    └── KernelError            a kernel that was asked for by name and cannot run here

Every message is one sentence or two that name the value, the rule and the way out. The command line prints the
message and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class KvqError(Exception):
    """Base of everything kvq raises on purpose."""


class RecipeError(KvqError, ValueError):
    """A recipe, codec setting or layer pattern that cannot work."""


class UnsupportedModelError(KvqError, ValueError):
    """A model whose KV cache kvq cannot quantize."""


class ModelNotFoundError(KvqError, OSError):
    """A model or data set that is neither on disk nor reachable."""


class CheckpointError(KvqError, ValueError):
    """A file that is missing, truncated, altered, or belongs to another model."""


class DataError(KvqError, ValueError):
    """Text or activations that cannot be used."""


class CacheError(KvqError, RuntimeError):
    """A cache operation that the packed state does not allow."""


class KernelError(KvqError, RuntimeError):
    """A kernel that was asked for by name and cannot run here."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the nearest known name, or the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


def listed(names: Iterable[str], last: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def one_line(error: BaseException) -> str:
    """All of an error's text as one line, cut where it is long, for use inside a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".: ")[:300]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for use inside a sentence."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ")[:200]
