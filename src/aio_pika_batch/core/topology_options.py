"""What a consumer's settings say about its topology, and where its dead letters go.

A dead letter keeps its original routing key, and must reach the dead-letter queue, and no queue of
another service. Whether it does follows from the types of two exchanges, the one that messages come
from and the dead-letter exchange, and from the bindings. What can't work is refused.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aio_pika_batch.core.message import FieldValue, Headers, is_short_string
from aio_pika_batch.core.retry import wait_queue_name
from aio_pika_batch.errors import ConfigurationError, TopologyError

QUEUE_TYPE = "x-queue-type"
DEAD_LETTER_EXCHANGE = "x-dead-letter-exchange"
DEAD_LETTER_ROUTING_KEY = "x-dead-letter-routing-key"
DEAD_LETTER_STRATEGY = "x-dead-letter-strategy"
MESSAGE_TTL = "x-message-ttl"
OVERFLOW = "x-overflow"

AT_LEAST_ONCE: Headers = {DEAD_LETTER_STRATEGY: "at-least-once", OVERFLOW: "reject-publish"}
"""The arguments of a quorum queue that keeps what it gives up until another queue has it. The
strategy needs the overflow behaviour."""

BROKER_DEAD_LETTERS = frozenset({DEAD_LETTER_EXCHANGE, DEAD_LETTER_ROUTING_KEY, *AT_LEAST_ONCE})
"""The arguments by which a queue dead-letters what the broker gives up."""

LENGTH_LIMITS = frozenset({"x-max-length", "x-max-length-bytes"})

_DELAYED_TYPE = "x-delayed-type"
"""The argument of an `x-delayed-message` exchange that says how it routes."""

_BY_KEY = frozenset({"direct", "topic"})
"""Exchange types that route by the routing key, so that services can share the exchange."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyOptions:
    """The settings of a consumer that concern its topology, by their names.

    Attributes:
        republishes: Whether retries are published again, by the default exchange.
        wait_levels: The delays in milliseconds of the wait queues to declare at the start.
    """

    # Only the delays that retries use by themselves: each one needs a queue that someone has to
    # look after. Those that a handler requests are declared when it does.

    queue_name: str
    queue_durable: bool = True
    queue_exclusive: bool = False
    queue_auto_delete: bool = False
    queue_type: str | None = None
    queue_arguments: Mapping[str, FieldValue] = field(default_factory=dict)
    exchange_name: str | None = None
    exchange_type: str = "direct"
    exchange_durable: bool = True
    exchange_auto_delete: bool = False
    exchange_internal: bool = False
    exchange_arguments: Mapping[str, FieldValue] = field(default_factory=dict)
    routing_keys: tuple[str, ...] = ()
    binding_arguments: Mapping[str, FieldValue] = field(default_factory=dict)
    dead_letter_exchange: str | None = None
    dead_letter_exchange_type: str | None = None
    dead_letter_routing_key: str | None = None
    dead_letter_queue: str | None = None
    broker_dead_letters: bool = True
    republishes: bool = False
    wait_levels: tuple[int, ...] = ()
    declare: bool = True

    @property
    def binding_keys(self) -> tuple[str, ...]:
        """The routing keys that bind the queue to its exchange."""
        return self.routing_keys or (self.queue_name,)


def effective_queue_type(options: TopologyOptions) -> str | None:
    """The queue type to declare; None uses the default of the virtual host."""
    return options.queue_type or _stated(options, QUEUE_TYPE)


def _stated(options: TopologyOptions, name: str) -> str | None:
    value = options.queue_arguments.get(name)
    return value if isinstance(value, str) else None


# --- where dead letters go ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeadLetterTarget:
    """Where dead letters are published.

    Attributes:
        exchange: The dead-letter exchange.
        routing_key: None keeps the original routing key of each message.
        also: A second routing key, which only this consumer's dead-letter queue is bound to; the
            broker removes it.
    """

    exchange: str
    routing_key: str | None = None
    also: str | None = None

    @property
    def broker_key(self) -> str | None:
        """The routing key by which the broker's own dead letters get there."""
        return self.routing_key if self.also is None else self.also


def dead_letter_target(options: TopologyOptions) -> DeadLetterTarget | None:
    """Where this library publishes dead letters; None if no exchange is configured."""
    exchange, routing_key = options.dead_letter_exchange, options.dead_letter_routing_key
    if exchange is None:
        exchange = _stated(options, DEAD_LETTER_EXCHANGE)
        if exchange is not None and routing_key is None:
            routing_key = _stated(options, DEAD_LETTER_ROUTING_KEY)
    if exchange is None and options.dead_letter_queue is not None:
        exchange = _own_exchange(options)
    if exchange is None:
        return None
    if options.dead_letter_queue is None:
        return DeadLetterTarget(exchange, routing_key)
    if not exchange:
        # The default exchange routes by the name of a queue: an original routing key would miss
        # this queue, and could even lead back to the queue that the message comes from.
        return DeadLetterTarget(
            exchange, options.dead_letter_queue if routing_key is None else routing_key
        )
    # A direct exchange can't be bound for all routing keys.
    is_unbindable = options.dead_letter_exchange_type == "direct" and _message_keys(options) is None
    if exchange == _own_exchange(options) and (not is_unbindable or routing_key is not None):
        return DeadLetterTarget(exchange, routing_key)
    # Several services may have messages with the same routing key, so by this key their dead
    # letters couldn't be distinguished. Nor by the name of the queue alone: it often is the routing
    # key of messages of others.
    also = f"{options.queue_name}.dead-letter"
    if not is_short_string(also):
        also = options.queue_name
    if exchange == options.exchange_name and routing_key is None:
        # By its original routing key a message would come back.
        return DeadLetterTarget(exchange, also)
    return DeadLetterTarget(exchange, routing_key, also)


def _own_exchange(options: TopologyOptions) -> str:
    return f"{options.queue_name}.dlx"


def new_dead_letter_exchange_type(options: TopologyOptions, exchange: str) -> str:
    """The type with which a missing dead-letter exchange is declared."""
    default = "fanout" if exchange == _own_exchange(options) else "direct"
    return options.dead_letter_exchange_type or default


def dead_letter_binding_keys(
    options: TopologyOptions, target: DeadLetterTarget, existing_type: str | None
) -> tuple[str, ...]:
    """The routing keys that bind the dead-letter queue, so that every dead letter reaches it.

    Args:
        existing_type: The type of the exchange on the broker; None if it is missing or unknown.

    Raises:
        TopologyError: Some dead letters wouldn't reach the queue, or others would.
    """
    exchange, stated = target.exchange, options.dead_letter_exchange_type
    kind = existing_type or new_dead_letter_exchange_type(options, exchange)
    if stated not in (None, kind):
        raise TopologyError(
            f"exchange {exchange!r} exists as a {kind} exchange, not {stated}: set"
            f" dead_letter_exchange_type={kind!r}, or leave it unset"
        )
    # By its name it belongs to this consumer alone, if any exchange does.
    is_own = exchange.startswith(f"{options.queue_name}.")
    if kind not in _BY_KEY and not is_own:
        raise TopologyError(
            f"exchange {exchange!r} is a {kind} exchange: it may give dead letters to every queue"
            " that is bound to it, also to those of other services; use a direct or topic exchange,"
            f" one whose name begins with '{options.queue_name}.', or leave dead_letter_exchange"
            " unset"
        )
    if target.also is not None:
        # The queue's own arguments may state another key for the broker's dead letters.
        for_broker = _stated(options, DEAD_LETTER_ROUTING_KEY)
        return (target.also,) if for_broker is None else (target.also, for_broker)
    if target.routing_key is not None:
        return (target.routing_key,)
    match kind:
        case "fanout" | "headers":
            return ("",)
        case "topic":
            return ("#",)
        case _:
            keys = _message_keys(options)
            if keys is None:
                raise TopologyError(
                    f"dead letters would not reach queue {options.dead_letter_queue!r}: a {kind}"
                    f" exchange can't be bound for all routing keys that messages from exchange"
                    f" {options.exchange_name!r} may have; leave dead_letter_exchange_type unset,"
                    " or set dead_letter_routing_key"
                )
            return keys


def _message_keys(options: TopologyOptions) -> tuple[str, ...] | None:
    """The routing keys that messages in the queue can have; None: any."""
    # Messages from the default exchange have the name of the queue as their routing key.
    if not options.exchange_name:
        return (options.queue_name,)
    keys = tuple(dict.fromkeys((*options.binding_keys, options.queue_name)))
    match _routing_of(options):
        case "direct":
            return keys
        case "topic":
            is_pattern = any({"*", "#"} & set(key.split(".")) for key in options.binding_keys)
            return None if is_pattern else keys
        case _:
            return None


def _routing_of(options: TopologyOptions) -> FieldValue:
    """How the consumer's exchange routes, also if it delays."""
    return options.exchange_arguments.get(_DELAYED_TYPE, options.exchange_type)


# --- what the broker itself gives up -----------------------------------------------------


def broker_dead_letter_arguments(options: TopologyOptions) -> Headers:
    """The arguments that make the broker dead-letter what it gives up to the same destination."""
    target = dead_letter_target(options)
    if target is None or not options.broker_dead_letters:
        return {}
    given = options.queue_arguments
    key = target.broker_key
    wanted: dict[str, FieldValue] = {}
    if DEAD_LETTER_EXCHANGE not in given:
        wanted[DEAD_LETTER_EXCHANGE] = target.exchange
    if (
        key is not None
        and DEAD_LETTER_ROUTING_KEY not in given
        and given.get(DEAD_LETTER_EXCHANGE, target.exchange) == target.exchange
    ):
        wanted[DEAD_LETTER_ROUTING_KEY] = key
    # With a length limit, `reject-publish` would refuse new messages instead of dropping old ones.
    is_lossless = effective_queue_type(options) == "quorum" and not given.keys() & (
        LENGTH_LIMITS | AT_LEAST_ONCE.keys()
    )
    return {**wanted, **AT_LEAST_ONCE} if is_lossless else wanted


def declared_arguments(options: TopologyOptions) -> Headers:
    """The arguments with which a new queue is declared, apart from its type."""
    return {**options.queue_arguments, **broker_dead_letter_arguments(options)}


def dead_letters_differ(options: TopologyOptions) -> bool:
    """Whether the broker's dead letters may go somewhere else than those of this library."""
    target = dead_letter_target(options)
    if target is None:
        return False
    arguments = declared_arguments(options)
    own = (arguments.get(DEAD_LETTER_EXCHANGE), arguments.get(DEAD_LETTER_ROUTING_KEY))
    return own != (target.exchange, target.broker_key)


def policy_command(queue: str, arguments: Headers, vhost: str) -> str:
    """The command that gives an existing queue arguments that it was declared without."""
    definition = {name.removeprefix("x-"): value for name, value in arguments.items()}
    where = [] if vhost == "/" else ["-p", vhost]
    pattern = f"^{re.escape(queue)}$"
    words = ["rabbitmqctl", "set_policy", *where, "--apply-to", "queues", f"{queue}-dead-letters"]
    return shlex.join([*words, pattern, json.dumps(definition)])


# --- loops -------------------------------------------------------------------------------


def refuse_loops(options: TopologyOptions) -> None:
    """Refuse settings by which dead letters come back to the queue that they come from.

    Raises:
        ConfigurationError: They do.
    """
    why = _loop(options)
    if why is not None:
        raise ConfigurationError(
            f"dead letters of queue {options.queue_name!r} would come back to itself, a loop:"
            f" {why}; set dead_letter_queue to another queue"
        )


def _loop(options: TopologyOptions) -> str | None:
    if options.dead_letter_queue == options.queue_name:
        return "dead_letter_queue is the queue itself"
    if _is_wait_queue(options, options.dead_letter_queue):
        return f"{options.dead_letter_queue!r} is the name of a queue for its retries"
    target = dead_letter_target(options)
    if target is not None and (why := _way_back(options, target.exchange, target.routing_key)):
        return why
    # The broker's own dead letters may go elsewhere.
    arguments = declared_arguments(options)
    exchange, key = arguments.get(DEAD_LETTER_EXCHANGE), arguments.get(DEAD_LETTER_ROUTING_KEY)
    if isinstance(exchange, str) and (key is None or isinstance(key, str)):
        return _way_back(options, exchange, key)
    return None


def _way_back(options: TopologyOptions, exchange: str, key: str | None) -> str | None:
    """Why a dead letter that is published there returns to the queue; None if it doesn't."""
    if not exchange:
        if key in (None, options.queue_name) or _is_wait_queue(options, key):
            return "the default exchange routes them by the name of the queue"
        return None
    if exchange == options.exchange_name and (key is None or _is_bound(options, key)):
        return f"exchange {exchange!r} is the one that the queue is bound to"
    return None


def _is_wait_queue(options: TopologyOptions, name: str | None) -> bool:
    """Whether a queue of this name holds retries, and dead-letters them to the consumer's queue."""
    return name is not None and name.startswith(wait_queue_name(options.queue_name, ""))


def _is_bound(options: TopologyOptions, key: str) -> bool:
    """Whether the consumer's exchange gives messages with this routing key to the queue."""
    match _routing_of(options):
        case "direct":
            return key in options.binding_keys
        case "topic":
            words = topic_words(key)
            return any(topic_matches(topic_words(each), words) for each in options.binding_keys)
        case _:
            return True


def topic_words(key: str) -> list[str]:
    """Return the words of a routing key or pattern."""
    # An empty key has none, and not an empty one as Python has it.
    return key.split(".") if key else []


def topic_matches(pattern: Sequence[str], words: Sequence[str]) -> bool:
    """Return whether a pattern matches the words of a routing key."""
    # The lengths of the pattern's prefixes that can match the words so far. Each word moves them
    # on, so that the time is pattern times words, however many # there are.
    reached = _skip_hashes({0}, pattern)
    for word in words:
        next_reached = {at for at in reached if at < len(pattern) and pattern[at] == "#"}
        next_reached |= {
            at + 1 for at in reached if at < len(pattern) and pattern[at] in {"*", word} - {"#"}
        }
        reached = _skip_hashes(next_reached, pattern)
    return len(pattern) in reached


def _skip_hashes(reached: set[int], pattern: Sequence[str]) -> set[int]:
    """Add the prefixes that are reached if a # matches no word."""
    skipped = set(reached)
    for at in reached:
        while at < len(pattern) and pattern[at] == "#":
            at += 1  # noqa: PLW2901  -- walks on from where it stands
            skipped.add(at)
    return skipped
