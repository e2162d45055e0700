"""How far one step of a long work is: told from inside the step to whoever shows it, past the functions between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[float], None] | None] = ContextVar("listener", default=None)


def is_heard() -> bool:
    """False if nobody shows progress, so that nothing has to be counted for it."""
    return _listener.get() is not None


def tell(steps: float) -> None:
    """Say that so many steps, mostly less than one, are done beyond those that progress was last called with."""
    listener = _listener.get()
    if listener is not None:
        listener(steps)


@contextmanager
def listening(listener: Callable[[float], None]) -> Iterator[None]:
    """``listener`` gets what is told inside, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
