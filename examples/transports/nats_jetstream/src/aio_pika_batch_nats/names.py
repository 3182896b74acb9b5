"""What are queues, exchanges and routing keys called on NATS?

A queue is a stream of the same name. Its own subject stands for AMQP's default exchange, and a
binding is one more subject of it. Whatever a subject has another use for is encoded as in URLs, but
behind `=`: the server makes patterns of names, in which a `%` would stand for something else.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

from aio_pika_batch.transport import TopologyError

_EMPTY = "="
"""A token cannot be empty, and this one cannot come of anything else."""

_QUEUE = "queue"
_EXCHANGE = "exchange"


def token(text: str) -> str:
    """One token of a subject, or a stream's name."""
    return quote(text, safe="").replace(".", "%2E").replace("%", "=") or _EMPTY


def _text(token: str) -> str:
    return "" if token == _EMPTY else unquote(token.replace("=", "%"))


def subject_of(exchange: str, routing_key: str) -> str:
    """Where a publication goes."""
    if not exchange:
        return f"{_QUEUE}.{token(routing_key)}"
    return ".".join((_EXCHANGE, token(exchange), *map(token, routing_key.split("."))))


def route_of(subject: str) -> tuple[str, str]:
    """Exchange and routing key of a subject; one that we did not make is a routing key."""
    match subject.split("."):
        case [kind, queue] if kind == _QUEUE:
            return "", _text(queue)
        case [kind, exchange, *words] if kind == _EXCHANGE and words:
            return _text(exchange), ".".join(map(_text, words))
        case _:
            return "", subject


def everything_of(exchange: str) -> str:
    """The subjects of all that is published to an exchange."""
    return f"{_EXCHANGE}.{token(exchange)}.>"


def bound_subjects(exchange: str, kind: str, routing_key: str) -> list[str]:
    """The subjects that a binding means.

    Raises:
        TopologyError: Subjects cannot say it.
    """
    match kind:
        case "fanout":
            return [everything_of(exchange)]
        case "direct":
            return [subject_of(exchange, routing_key)]
        case "topic":
            return _topic(exchange, routing_key)
        case _:
            raise TopologyError(
                f"exchange {exchange!r}: NATS has nothing like the type {kind!r};"
                " use direct, fanout or topic"
            )


def _topic(exchange: str, pattern: str) -> list[str]:
    *first, last = ["*" if word == "*" else token(word) for word in pattern.split(".")]
    many = token("#")
    if many in first:
        raise TopologyError(
            f"binding {pattern!r} to exchange {exchange!r}: NATS has # at the end of a pattern only"
        )
    start = [_EXCHANGE, token(exchange), *first]
    if last != many:
        return [".".join([*start, last])]
    # `#` is also no word at all, and `>` is at least one.
    none = [".".join(start)] if first else []
    return [*none, ".".join([*start, ">"])]
