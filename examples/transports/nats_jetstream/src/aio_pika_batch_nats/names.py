"""Maps queues, exchanges and routing keys to names on NATS.

A queue is a stream of the same name. Its own subject stands for AMQP's default exchange, and a
binding is one more subject of the stream. Characters that are special in a subject are encoded as
in URLs, but with `=`: the server uses names as patterns, in which `%` has another meaning.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

from aio_pika_batch.transport import TopologyError

_EMPTY = "="
"""Stands for an empty token. No other text is encoded as this."""

_QUEUE = "queue"
_EXCHANGE = "exchange"


def token(text: str) -> str:
    """Return one token of a subject, or a stream's name."""
    return quote(text, safe="").replace(".", "%2E").replace("%", "=") or _EMPTY


def _text(token: str) -> str:
    return "" if token == _EMPTY else unquote(token.replace("=", "%"))


def subject_of(exchange: str, routing_key: str) -> str:
    """Return the subject of a publication."""
    if not exchange:
        return f"{_QUEUE}.{token(routing_key)}"
    return ".".join((_EXCHANGE, token(exchange), *map(token, routing_key.split("."))))


def route_of(subject: str) -> tuple[str, str]:
    """Return exchange and routing key of a subject; a foreign subject is a routing key."""
    match subject.split("."):
        case [kind, queue] if kind == _QUEUE:
            return "", _text(queue)
        case [kind, exchange, *words] if kind == _EXCHANGE and words:
            return _text(exchange), ".".join(map(_text, words))
        case _:
            return "", subject


def everything_of(exchange: str) -> str:
    """Return the pattern of all subjects of an exchange."""
    return f"{_EXCHANGE}.{token(exchange)}.>"


def bound_subjects(exchange: str, kind: str, routing_key: str) -> list[str]:
    """Return the subjects of a binding.

    Raises:
        TopologyError: Subjects can't express it.
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
