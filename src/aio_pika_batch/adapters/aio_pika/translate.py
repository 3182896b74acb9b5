"""How does a foreign exception become one of ours, and a foreign hang end?

The libraries below raise what comes: their own errors, bare `Exception`, `RuntimeError`, and
`CancelledError` out of futures that they cancel themselves. None of it goes further than the
adapter.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.errors import AioPikaBatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

_GRACE = 0.5
"""Seconds for what was given up to notice."""

_left_behind: set[asyncio.Task[Any]] = set()
"""Tasks that nobody waits for any more; the event loop itself would forget them."""


@contextmanager
def translated(make: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Raise what *make* makes of any foreign exception.

    A cancellation is foreign too, unless it is this very task that is being cancelled.
    """
    try:
        yield
    except AioPikaBatchError:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise make(error) from error
    except Exception as error:
        raise make(error) from error


def describe(error: BaseException) -> str:
    """Put an exception into words, also one that has none of its own."""
    return str(error) or type(error).__name__


async def within(
    seconds: float, work: Coroutine[Any, Any, Any], give_up: Callable[[], None]
) -> bool:
    """Wait for *work*, but not longer than *seconds*, whatever it does with its cancellation.

    Args:
        seconds: How long to wait.
        work: What may hang. Its exceptions are dropped.
        give_up: Called when time is up, or when the waiting itself is cancelled; it should make an
            end of what *work* waits for.

    Returns:
        Whether it has ended by itself.
    """
    task = asyncio.ensure_future(work)
    _left_behind.add(task)
    task.add_done_callback(_forget)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        give_up()
        task.cancel()
        raise
    if task.done():
        return True
    give_up()
    if not (await asyncio.wait({task}, timeout=_GRACE))[0]:
        task.cancel()
        await asyncio.wait({task}, timeout=_GRACE)
    return False


def _forget(task: asyncio.Task[Any]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()
