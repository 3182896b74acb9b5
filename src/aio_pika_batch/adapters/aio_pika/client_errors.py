"""Translates what client libraries raise and why the broker closes, and bounds how long both hang.

The libraries raise their own errors, bare `Exception`, `RuntimeError`, and `CancelledError` from
futures that they cancel themselves. None of these leaves the adapter.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from aiormq import exceptions

from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, ConnectionClosed
from aio_pika_batch.adapters.connecting import causes_of, login_advice, reason_of
from aio_pika_batch.core.refusals import ReplyCode, is_transient
from aio_pika_batch.errors import (
    AccessRefused,
    AioPikaBatchError,
    BrokerUnavailable,
    SessionLost,
    TransportError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from aio_pika_batch.adapters.aio_pika.events import Closed
    from aio_pika_batch.adapters.url import Address

# aiormq keeps the text and, for the usual codes, raises a class instead of keeping the code.
_CHANNEL_CODES: Final[dict[type[BaseException], int]] = {
    exceptions.ChannelAccessRefused: ReplyCode.ACCESS_REFUSED,
    exceptions.ChannelNotFoundEntity: ReplyCode.NOT_FOUND,
    exceptions.ChannelLockedResource: ReplyCode.RESOURCE_LOCKED,
    exceptions.ChannelPreconditionFailed: ReplyCode.PRECONDITION_FAILED,
}
_CONNECTION_CODES: Final[dict[type[BaseException], int]] = {
    exceptions.ProbableAuthenticationError: ReplyCode.ACCESS_REFUSED,
    exceptions.ConnectionFrameError: ReplyCode.FRAME_ERROR,
    exceptions.ConnectionSyntaxError: ReplyCode.SYNTAX_ERROR,
    exceptions.ConnectionCommandInvalid: ReplyCode.COMMAND_INVALID,
    exceptions.ConnectionChannelError: ReplyCode.CHANNEL_ERROR,
    exceptions.ConnectionUnexpectedFrame: ReplyCode.UNEXPECTED_FRAME,
    exceptions.ConnectionResourceError: ReplyCode.RESOURCE_ERROR,
    exceptions.ConnectionNotAllowed: ReplyCode.NOT_ALLOWED,
    exceptions.ConnectionNotImplemented: ReplyCode.NOT_IMPLEMENTED,
    exceptions.ConnectionInternalError: ReplyCode.INTERNAL_ERROR,
}
_FINAL: Final = {ReplyCode.ACCESS_REFUSED, ReplyCode.NOT_FOUND, ReplyCode.NOT_ALLOWED}

_GRACE = 0.5  # seconds that abandoned work has to notice it

# Tasks that nothing awaits any more. The event loop keeps only weak references.
_abandoned: set[asyncio.Task[Any]] = set()


def close_reason(error: BaseException | None) -> Closed | None:
    """Find the broker's reply code and text in an exception or its causes.

    The frame tap's events are more exact, and come earlier. Use this if there was none.
    """
    for cause in causes_of(error):
        kind = type(cause)
        if kind in _CHANNEL_CODES:
            return ChannelClosed(_CHANNEL_CODES[kind], str(cause))
        if kind in _CONNECTION_CODES:
            return ConnectionClosed(_CONNECTION_CODES[kind], str(cause))
        match cause:
            case exceptions.ChannelClosed(args=(int(code), str(text))) if code:
                return ChannelClosed(code, text)
            case exceptions.ConnectionClosed(args=(int(code), str(text))) if code:
                return ConnectionClosed(code, text)
            case _:
                pass
    return None


def connection_error(closed: Closed, address: Address) -> TransportError:
    """Make an error of a connection that the broker closed while it was being opened."""
    code, text = closed
    said = f"{code} {text}".rstrip(".")
    refusal = f"{address} refused the connection of user {address.user!r}: {said}"
    if code not in _FINAL or is_transient(text):
        return BrokerUnavailable(f"{refusal}; try again later")
    if code == ReplyCode.ACCESS_REFUSED:
        advice = login_advice(address)
    elif "not found" in text:
        advice = f"check the virtual host {address.vhost!r} in the URL, or create it"
    else:
        advice = f"give the user permissions in the virtual host {address.vhost!r}"
    return AccessRefused(f"{refusal}; {advice}")


def describe_channel_close(closed: Closed) -> str:
    """Return why a consuming channel was closed, in words."""
    code, text = closed
    advice = ""
    if code == ReplyCode.PRECONDITION_FAILED and "timeout" in text:
        advice = "; messages were held longer than the broker's consumer_timeout allows"
    return f"the broker closed the channel: {code} {text}{advice}"


@contextmanager
def translate_errors(make: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Replace the exceptions of a client library by the one that *make* returns.

    This includes cancellations, unless it is the current task that is being cancelled.
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


def lost_on_error(what: str) -> AbstractContextManager[None]:
    """Replace the exceptions of a client library by SessionLost, with *what* and their text."""
    return translate_errors(lambda error: SessionLost(f"{what}: {reason_of(error)}"))


async def finish_within(
    seconds: float, work: Coroutine[Any, Any, Any], give_up: Callable[[], None]
) -> bool:
    """Wait for *work* for at most *seconds*, even if it ignores its cancellation.

    Args:
        seconds: How long to wait.
        work: What may hang. Its exceptions are dropped.
        give_up: Called when time is up, or when the waiting itself is cancelled. It should end what
            *work* waits for.

    Returns:
        Whether *work* ended by itself.
    """
    task = asyncio.ensure_future(work)
    _abandoned.add(task)
    task.add_done_callback(_forget)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        give_up()
        task.cancel()
        raise
    if task.done():
        return True
    # Work usually ends once its connection is gone. Otherwise it is cancelled, and left behind if
    # it ignores that.
    give_up()
    if not (await asyncio.wait({task}, timeout=_GRACE))[0]:
        task.cancel()
        await asyncio.wait({task}, timeout=_GRACE)
    return False


def _forget(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    consume_exception(task)


def consume_exception(task: asyncio.Task[Any]) -> None:
    """Mark a task's exception as retrieved. asyncio would log it if nothing awaits the task."""
    if not task.cancelled():
        task.exception()
