"""All errors that this library raises on purpose. Their classes say who can fix the problem.

This module imports nothing, so that every other module can import it.
"""


class AioPikaBatchError(Exception):
    """Base class of all errors that this library raises on purpose."""


# A ValueError, because it is raised for the value of an argument.
class ConfigurationError(AioPikaBatchError, ValueError):
    """The configuration is invalid. Raised when the consumer is constructed."""


class TransportError(AioPikaBatchError):
    """Base class of errors from the broker, or from the connection to it."""


class BrokerUnavailable(TransportError):
    """The broker didn't answer, or the connection was lost. Another attempt may succeed."""


class AccessRefused(TransportError):
    """The broker refused access: user, password, virtual host or permission; or the host name in
    the URL is unknown.
    """


class TopologyError(TransportError):
    """A queue, exchange or binding on the broker differs from the declared one.

    The text contains the broker's answer and what to do about it.
    """


class SessionLost(TransportError):
    """The session ended unexpectedly. The broker delivers all unsettled messages again."""


class SessionClosed(TransportError):
    """A session or publisher was used after you closed it."""


class SettlementError(TransportError):
    """A delivery tag was settled twice, or in a session that never delivered it."""


class PublishError(TransportError):
    """The broker did not confirm a message: it was returned, refused, or left unanswered."""


# A ValueError, as `json.loads` raises, so that a handler can go on catching that.
class MessageDecodeError(AioPikaBatchError, ValueError):
    """The body or a property of one message cannot be decoded.

    If your handler doesn't catch it, only this message is dead-lettered.

    Attributes:
        message: The :class:`~aio_pika_batch.Message` that cannot be decoded.
        field: `"body"`, or the name of the property.
    """

    def __init__(self, message: object, field: str, why: str) -> None:
        super().__init__(f"{field} of {message!r} cannot be decoded: {why}")
        self.message = message
        self.field = field


class ResultError(AioPikaBatchError, ValueError):
    """A handler yielded an invalid result: too many, a duplicate, an unknown value, or one for a
    message of another batch.
    """


class MissingMessageId(AioPikaBatchError, ValueError):
    """Messages have no id by which an inbox could know them again.

    Leaving the handler, it fails these messages alone.

    Attributes:
        messages: Those without an id.
    """

    def __init__(self, messages: tuple[object, ...]) -> None:
        super().__init__(
            f"{len(messages)} messages have no message_id, the first is {messages[0]!r}: let the"
            " publisher set one (aio-pika sets none by itself), or name what identifies a message"
            " by Inbox(identity=…), or process those unprotected by Inbox(missing='process')"
        )
        self.messages = messages


# A TimeoutError, so that what `exception_results` says of that class applies.
class HandlerTimeout(AioPikaBatchError, TimeoutError):
    """A handler ran longer than `process_timeout` seconds and was cancelled."""


class DrainIncomplete(AioPikaBatchError):
    """A graceful shutdown ended too early. The text says how many messages are affected.

    Messages whose handlers hadn't ended are delivered again. Messages whose settlement the broker
    hasn't confirmed may be delivered again.
    """


class StartInterrupted(AioPikaBatchError):
    """`stop` was called before all workers were consuming."""


def safe_str(value: object) -> str:
    """Return `str(value)`, or a placeholder if that raises."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  -- a user's __str__ may raise anything
        return f"(no text: str() raised {type(error).__name__})"
