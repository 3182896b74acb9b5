"""What did the broker say, where only the client library's exception is left of it?

The library knows a class for each of the usual codes, and keeps the text. Where the tap is
installed, its own words are better, and come earlier.
"""

from __future__ import annotations

from typing import Final

from aiormq import exceptions

from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, ConnectionClosed

_CHANNEL: Final[dict[type[BaseException], int]] = {
    exceptions.ChannelAccessRefused: 403,
    exceptions.ChannelNotFoundEntity: 404,
    exceptions.ChannelLockedResource: 405,
    exceptions.ChannelPreconditionFailed: 406,
}
_CONNECTION: Final[dict[type[BaseException], int]] = {
    exceptions.ProbableAuthenticationError: 403,
    exceptions.ConnectionFrameError: 501,
    exceptions.ConnectionSyntaxError: 502,
    exceptions.ConnectionCommandInvalid: 503,
    exceptions.ConnectionChannelError: 504,
    exceptions.ConnectionUnexpectedFrame: 505,
    exceptions.ConnectionResourceError: 506,
    exceptions.ConnectionNotAllowed: 530,
    exceptions.ConnectionNotImplemented: 540,
    exceptions.ConnectionInternalError: 541,
}


def said(error: BaseException | None) -> ChannelClosed | ConnectionClosed | None:
    """Find the broker's words in an exception, or in what caused it."""
    while error is not None:
        kind = type(error)
        if kind in _CHANNEL:
            return ChannelClosed(_CHANNEL[kind], str(error))
        if kind in _CONNECTION:
            return ConnectionClosed(_CONNECTION[kind], str(error))
        match error:
            case exceptions.ChannelClosed(args=(int(code), str(text))) if code:
                return ChannelClosed(code, text)
            case exceptions.ConnectionClosed(args=(int(code), str(text))) if code:
                return ConnectionClosed(code, text)
            case _:
                error = error.__cause__
    return None
