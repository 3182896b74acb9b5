"""Whose fault is it? The first thing that the type of an error says.

The whole family, on one screen. Nothing is imported here, so that everything may import it.
"""


class AioPikaBatchError(Exception):
    """Every error that this library raises on purpose."""


class ConfigurationError(AioPikaBatchError, ValueError):
    """What you configured cannot work; raised at construction, never at three in the morning."""


class TransportError(AioPikaBatchError):
    """Something between the consumer and its broker; the subclasses say who ended it."""


class BrokerUnavailable(TransportError):
    """Nobody answered, or the answer was cut off: worth another attempt."""


class AccessRefused(TransportError):
    """The broker said no: user, password, virtual host, permission; or there is no such host."""


class TopologyError(TransportError):
    """A queue, exchange or binding on the broker is not the declared one.

    The text holds the broker's own words and what to do about them.
    """


class SessionLost(TransportError):
    """The world ended the session; whatever was unsettled will be delivered again."""


class SessionClosed(TransportError):
    """You ended the session, and used it afterwards."""


class SettlementError(TransportError):
    """A delivery tag was settled twice, or in a session that never delivered it."""


class PublishError(TransportError):
    """The broker did not confirm a message: it was returned, refused, or nothing was heard."""


class MessageDecodeError(AioPikaBatchError, ValueError):
    """One message's body or property is not what its reader expected.

    Leaving the handler, it dead-letters that message alone.

    Attributes:
        message: The message (:class:`~aio_pika_batch.Message`) that cannot be decoded.
        field: `"body"`, or the name of the property.
    """

    def __init__(self, message: object, field: str, why: str) -> None:
        super().__init__(f"{field} of {message!r} cannot be decoded: {why}")
        self.message = message
        self.field = field


class ResultError(AioPikaBatchError, ValueError):
    """A handler yielded what is no answer to its batch: too much, twice, unknown or foreign."""


class HandlerTimeout(AioPikaBatchError, TimeoutError):
    """A handler ran for longer than `process_timeout` seconds and was cancelled."""


class DrainIncomplete(AioPikaBatchError):
    """A shutdown ended before its work did: what was cut off will be delivered again."""


class StartInterrupted(AioPikaBatchError):
    """`stop` was called before every worker consumed."""


def safe_str(value: object) -> str:
    """Return `str(value)`, or a placeholder if that raises."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  -- a user's __str__ may raise anything
        return f"(no text: str() raised {type(error).__name__})"
