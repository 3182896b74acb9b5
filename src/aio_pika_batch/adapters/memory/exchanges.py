"""Routes messages from an exchange to the queues that are bound to it.

The exchange type decides which bindings match: `direct` compares the routing key, `fanout` matches
always, `topic` compares word by word (`*` is one word, `#` any number), and `headers` compares the
headers with the binding's arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

from aio_pika_batch.adapters.memory.rabbitmq import (
    Refusal,
    VersionRules,
    format_flag,
    format_value,
    inequivalent_argument,
    is_same,
)
from aio_pika_batch.adapters.memory.stored_message import StoredMessage
from aio_pika_batch.core.message import Headers
from aio_pika_batch.core.refusals import ReplyCode
from aio_pika_batch.core.topology_options import topic_matches, topic_words


class ExchangeType(Enum):
    """The exchange types of RabbitMQ without plugins."""

    DIRECT = "direct"
    FANOUT = "fanout"
    TOPIC = "topic"
    HEADERS = "headers"


_MATCH = "x-match"
_MATCHES = ("all", "any", "all-with-x", "any-with-x")
_ALTERNATE = "alternate-exchange"


def parse_exchange_type(name: str, rules: VersionRules) -> ExchangeType:
    """Return the exchange type of this name.

    Raises:
        Refusal: It does not exist, or is a plugin's.
    """
    try:
        return ExchangeType(name)
    except ValueError:
        code = (
            ReplyCode.COMMAND_INVALID
            if rules.unknown_type_closes_connection
            else ReplyCode.PRECONDITION_FAILED
        )
        raise Refusal(code, f"unknown exchange type '{name}'") from None


@dataclass(frozen=True, slots=True)
class ExchangeBinding:
    """A binding, as its exchange stores it."""

    queue: str
    routing_key: str
    arguments: Headers = field(default_factory=dict)


@dataclass(slots=True)
class MemoryExchange:
    """An exchange and its bindings, in the order in which they were made."""

    name: str
    type: ExchangeType
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False
    arguments: Headers = field(default_factory=dict)
    bindings: list[ExchangeBinding] = field(default_factory=list)

    def check_same(self, declared: MemoryExchange) -> None:
        """Compare with another declaration.

        Raises:
            Refusal: It differs.
        """
        entity = f"exchange '{self.name}'"
        for argument, received, current in (
            ("type", f"'{declared.type.value}'", f"'{self.type.value}'"),
            ("durable", format_flag(declared.durable), format_flag(self.durable)),
            ("auto_delete", format_flag(declared.auto_delete), format_flag(self.auto_delete)),
            ("internal", format_flag(declared.internal), format_flag(self.internal)),
        ):
            if received != current:
                raise inequivalent_argument(argument, entity, received, current)
        # RabbitMQ compares no other argument of an exchange.
        one, other = declared.arguments.get(_ALTERNATE), self.arguments.get(_ALTERNATE)
        if one != other:
            raise inequivalent_argument(_ALTERNATE, entity, format_value(one), format_value(other))

    @property
    def alternate(self) -> str | None:
        """The exchange that gets what matches no binding."""
        name = self.arguments.get(_ALTERNATE)
        return name if isinstance(name, str) else None

    def bind(self, binding: ExchangeBinding) -> None:
        """Add a binding, unless it exists.

        Raises:
            Refusal: Its arguments are invalid.
        """
        if self.type is ExchangeType.HEADERS:
            match = binding.arguments.get(_MATCH, "all")
            if match not in _MATCHES:
                raise Refusal(
                    ReplyCode.PRECONDITION_FAILED,
                    f'Invalid x-match field value <<"{match!s}">>; expected all, any, all-with-x,'
                    " or any-with-x",
                )
        if binding not in self.bindings:
            self.bindings.append(binding)

    def unbind(self, binding: ExchangeBinding) -> None:
        """Remove a binding, if it exists."""
        if binding in self.bindings:
            self.bindings.remove(binding)

    def unbind_queue(self, queue: str) -> bool:
        """Remove the bindings of a deleted queue; return whether there were any."""
        before = len(self.bindings)
        self.bindings = [binding for binding in self.bindings if binding.queue != queue]
        return len(self.bindings) < before

    def route(self, message: StoredMessage) -> Iterable[str]:
        """Return the queues whose bindings match, each once."""
        # A dict and not a set, to keep the order of the bindings.
        return dict.fromkeys(
            binding.queue for binding in self.bindings if self._matches(binding, message)
        )

    def _matches(self, binding: ExchangeBinding, message: StoredMessage) -> bool:
        match self.type:
            case ExchangeType.FANOUT:
                return True
            case ExchangeType.DIRECT:
                return binding.routing_key in message.routing_keys
            case ExchangeType.TOPIC:
                pattern = topic_words(binding.routing_key)
                return any(topic_matches(pattern, topic_words(key)) for key in message.routing_keys)
            case ExchangeType.HEADERS:
                return headers_match(binding.arguments, message.headers)
            case never:
                assert_never(never)


def headers_match(wanted: Headers, headers: Headers) -> bool:
    """Return whether headers match a binding's arguments; None as a value matches any value."""
    mode = wanted.get(_MATCH, "all")
    match_all = mode in {"all", "all-with-x"}
    with_x = mode in {"all-with-x", "any-with-x"}
    matched = (
        name in headers and (value is None or is_same(value, headers[name]))
        for name, value in wanted.items()
        if name != _MATCH and (with_x or not name.startswith("x-"))
    )
    return all(matched) if match_all else any(matched)
