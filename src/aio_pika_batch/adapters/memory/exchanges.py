"""Which queues does a message go to?

Matching is by exchange type: `direct` compares the routing key, `fanout` takes everything, `topic`
compares word by word (`*` is one word, `#` any number), `headers` compares the headers with the
binding's arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, assert_never

from aio_pika_batch.adapters.memory.refusals import Refusal, told, unequal
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.stored_message import Stored
    from aio_pika_batch.adapters.memory.versions import Dialect
    from aio_pika_batch.core.message import FieldValue, Headers


class Kind(Enum):
    """An exchange type."""

    DIRECT = "direct"
    FANOUT = "fanout"
    TOPIC = "topic"
    HEADERS = "headers"


X_MATCH = "x-match"
_MATCHES = ("all", "any", "all-with-x", "any-with-x")
ALTERNATE = "alternate-exchange"


def kind(name: str, dialect: Dialect) -> Kind:
    """The type of that name.

    Raises:
        Refusal: There is none. Those of plugins are not imitated.
    """
    try:
        return Kind(name)
    except ValueError:
        hard = dialect.unknown_type_ends_connection
        code = ReplyCode.COMMAND_INVALID if hard else ReplyCode.PRECONDITION_FAILED
        raise Refusal(code, f"unknown exchange type '{name}'") from None


@dataclass(frozen=True, slots=True)
class Bound:
    """A binding as an exchange keeps it."""

    queue: str
    routing_key: str
    arguments: Headers = field(default_factory=dict)


@dataclass(slots=True)
class Exchange:
    """An exchange and its bindings, in the order in which they were made."""

    name: str
    kind: Kind
    durable: bool = True
    auto_delete: bool = False
    arguments: Headers = field(default_factory=dict)
    bindings: list[Bound] = field(default_factory=list)

    def check_same(
        self, kind: Kind, *, durable: bool, auto_delete: bool, arguments: Headers
    ) -> None:
        """Compare with another declaration.

        Raises:
            Refusal: It is not the same.
        """
        entity = f"exchange '{self.name}'"
        for argument, received, current in (
            ("type", kind.value, self.kind.value),
            ("durable", _word(durable), _word(self.durable)),
            ("auto_delete", _word(auto_delete), _word(self.auto_delete)),
        ):
            if received != current:
                raise unequal(argument, entity, f"'{received}'", f"'{current}'")
        one, other = arguments.get(ALTERNATE), self.arguments.get(ALTERNATE)
        if one != other:
            raise unequal(ALTERNATE, entity, told(one), told(other))

    @property
    def alternate(self) -> str | None:
        """Where messages go that no queue is bound for."""
        name = self.arguments.get(ALTERNATE)
        return name if isinstance(name, str) else None

    def bind(self, bound: Bound) -> None:
        """Add a binding; one that is there already stays as it is.

        Raises:
            Refusal: It cannot be matched.
        """
        if self.kind is Kind.HEADERS:
            match = bound.arguments.get(X_MATCH, "all")
            if match not in _MATCHES:
                raise Refusal(
                    ReplyCode.PRECONDITION_FAILED,
                    f'Invalid x-match field value <<"{match!s}">>; expected all, any, all-with-x,'
                    " or any-with-x",
                )
        if bound not in self.bindings:
            self.bindings.append(bound)

    def unbind(self, bound: Bound) -> None:
        """Take a binding away; one that is not there is no mistake."""
        if bound in self.bindings:
            self.bindings.remove(bound)

    def forget(self, queue: str) -> bool:
        """Take away the bindings of a queue that is gone; tell whether there were any."""
        before = len(self.bindings)
        self.bindings = [bound for bound in self.bindings if bound.queue != queue]
        return len(self.bindings) < before

    def route(self, message: Stored) -> Iterable[str]:
        """The queues it goes to, each once."""
        return dict.fromkeys(
            bound.queue for bound in self.bindings if self._matches(bound, message)
        )

    def _matches(self, bound: Bound, message: Stored) -> bool:
        match self.kind:
            case Kind.FANOUT:
                return True
            case Kind.DIRECT:
                return bound.routing_key in message.routing_keys
            case Kind.TOPIC:
                pattern = bound.routing_key.split(".")
                return any(topic_matches(pattern, key.split(".")) for key in message.routing_keys)
            case Kind.HEADERS:
                return headers_match(bound.arguments, message.headers)
            case never:
                assert_never(never)


def topic_matches(pattern: list[str], words: list[str]) -> bool:
    """Whether the words of a routing key are those of a pattern."""
    # Which prefixes of the pattern can have taken the words so far? Each word moves them on, so
    # that no pattern, however many # it has, takes longer than its length for each word.
    reached = _past_hashes({0}, pattern)
    for word in words:
        onward = {at for at in reached if at < len(pattern) and pattern[at] == "#"}
        onward |= {
            at + 1 for at in reached if at < len(pattern) and pattern[at] in {"*", word} - {"#"}
        }
        reached = _past_hashes(onward, pattern)
    return len(pattern) in reached


def _past_hashes(reached: set[int], pattern: list[str]) -> set[int]:
    """A # may also stand for no word at all."""
    past = set(reached)
    for at in reached:
        while at < len(pattern) and pattern[at] == "#":
            at += 1  # noqa: PLW2901  -- walks on from where it stands
            past.add(at)
    return past


def headers_match(wanted: Headers, headers: Headers) -> bool:
    """Whether headers are those that a binding's arguments ask for.

    A wanted value of None asks only that the header be there.
    """
    mode = wanted.get(X_MATCH, "all")
    every = mode in {"all", "all-with-x"}
    with_x = mode in {"all-with-x", "any-with-x"}
    asked = (
        name in headers and (value is None or _same(value, headers[name]))
        for name, value in wanted.items()
        if name != X_MATCH and (with_x or not name.startswith("x-"))
    )
    return all(asked) if every else any(asked)


def _same(one: FieldValue, other: FieldValue) -> bool:
    # 1 and True are equal in Python and not in AMQP.
    return type(one) is type(other) and one == other


def _word(flag: bool) -> str:  # noqa: FBT001
    return "true" if flag else "false"
