"""What does a check say when a clause is not kept?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ClauseBroken(AssertionError):
    """A transport did not do what a clause says; the text says what it did instead."""


def same(expected: object, found: object, what: str) -> None:
    """Hold what was found against what was expected.

    Raises:
        ClauseBroken: They differ.
    """
    if expected != found:
        raise ClauseBroken(f"{what}: expected {_shown(expected)}, found {_shown(found)}")


@contextmanager
def refused(error: type[Exception], what: str) -> Iterator[None]:
    """Expect an error.

    Raises:
        ClauseBroken: There was none, or another one.
    """
    try:
        yield
    except error:
        return
    except Exception as other:
        raise ClauseBroken(f"{what}: expected {error.__name__}, found {other!r}") from other
    raise ClauseBroken(f"{what}: expected {error.__name__}, and nothing was raised")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


_LONGEST = 400
