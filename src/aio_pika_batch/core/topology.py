"""The queues, exchanges and bindings that a consumer needs, as data.

Adapters declare them. They can also be exported as definitions for `rabbitmqctl import_definitions`
and *Import definitions* in the management UI.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

from aio_pika_batch.core.message import (
    NO_HEADERS,
    SHORT_STRING,
    FieldValue,
    Headers,
    is_short_string,
)
from aio_pika_batch.core.refusals import unequal_argument
from aio_pika_batch.core.retry import wait_queue_name
from aio_pika_batch.core.settlement import NativeRetries
from aio_pika_batch.core.topology_options import (
    AT_LEAST_ONCE,
    BROKER_DEAD_LETTERS,
    DEAD_LETTER_EXCHANGE,
    DEAD_LETTER_ROUTING_KEY,
    DEAD_LETTER_STRATEGY,
    MESSAGE_TTL,
    QUEUE_TYPE,
    TopologyOptions,
    broker_dead_letter_arguments,
    dead_letter_binding_keys,
    dead_letter_target,
    effective_queue_type,
    new_dead_letter_exchange_type,
)
from aio_pika_batch.errors import TopologyError

DELIVERY_LIMIT = "x-delivery-limit"

Version: TypeAlias = tuple[int, ...]
"""A version of RabbitMQ, for comparisons."""

AT_LEAST_ONCE_SINCE: Version = (3, 10)
"""The first RabbitMQ whose quorum queues keep an expired message until the next queue has it."""

DEFAULT_LIMIT_SINCE: Version = (4, 0)
"""The first RabbitMQ whose quorum queues have a delivery limit by default."""

AMQP10_SINCE: Version = (4, 0)
"""The first RabbitMQ that speaks AMQP 1.0 without a plugin."""

DELAYS_SINCE: Version = (4, 3)
"""The first RabbitMQ whose quorum queues keep a message until a given time, and count only failed
deliveries towards a delivery limit."""

DEFAULT_DELIVERY_LIMIT = 20
"""That limit."""


class Amqp10Obstacle(Enum):
    """Why a queue can't be consumed over AMQP 1.0 without a loss."""

    VERSION = auto()
    QUEUE_TYPE = auto()
    CONSUMER_ARGUMENTS = auto()
    DELIVERY_LIMIT = auto()


def amqp10_obstacle(
    version: Version | None,
    queue_type: str | None,
    queue_arguments: Headers,
    consumer_arguments: Headers = NO_HEADERS,
) -> Amqp10Obstacle | None:
    """Return the first obstacle; None if the queue can be consumed over AMQP 1.0.

    Args:
        version: The broker's version; None if it is unknown, and no obstacle.
        queue_type: None if it isn't known.
    """
    if version is not None and version < AMQP10_SINCE:
        return Amqp10Obstacle.VERSION
    if queue_type != "quorum":
        return Amqp10Obstacle.QUEUE_TYPE
    if consumer_arguments.keys() - {"x-priority"}:
        return Amqp10Obstacle.CONSUMER_ARGUMENTS
    limit = queue_arguments.get(DELIVERY_LIMIT)
    is_unlimited = isinstance(limit, int) and limit < 0
    if version is not None and version < DELAYS_SINCE and not is_unlimited:
        # Every return counts there, so that our own retries would use the limit up.
        return Amqp10Obstacle.DELIVERY_LIMIT
    return None


def native_retries(version: Version, arguments: Headers) -> NativeRetries:
    """What AMQP 1.0 can do without copies in a quorum queue that has these arguments."""
    # Nothing confirms a dead letter, so the queue itself must not lose it. What a policy
    # says is not visible here.
    is_safe = DEAD_LETTER_EXCHANGE in arguments and AT_LEAST_ONCE.items() <= arguments.items()
    is_new = version >= DELAYS_SINCE
    return NativeRetries(delays=is_new, headers=True, dead_letters=is_safe, uncounted=is_new)


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange.

    Attributes:
        type: `direct`, `fanout`, `topic`, `headers`, or the `x-…` type of a plugin.
        internal: Only other exchanges and the broker can publish to it.
        existing_first: Use an existing one as it is, and create it only if there is none.
        check_only: Never create it.
    """

    name: str
    type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    arguments: Headers = field(default_factory=dict)
    existing_first: bool = False
    check_only: bool = False
    internal: bool = False


@dataclass(frozen=True, slots=True)
class UnfulfilledWishes:
    """What an existing queue was declared without.

    Attributes:
        lacking: The wishes for which it has no argument.
        differing: What it has instead of other wishes.
    """

    lacking: Headers = field(default_factory=dict)
    differing: Headers = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lacking or self.differing)


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue; the other flags are those of :class:`Exchange`.

    Attributes:
        wishes: Further arguments. An existing queue may lack them, or have others; then they are
            in what :meth:`unfulfilled` returns.
        no_delivery_limit: The broker must not drop a message because of its number of deliveries.
            The argument for this depends on the broker, see :meth:`arguments_on`.
        holds_retries: Messages wait in it for their next attempt, and must not get lost.
        if_unequal: Advice for when the broker has it with other arguments; None: as for any queue.
        if_missing: Advice for when the broker doesn't have it; None: as for any queue.
        is_consumed: The consumer's own queue. An existing one may have other dead-letter arguments,
            from a consumer with other settings, and no delivery limit, as the dead-letter queue of
            another consumer.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Headers = field(default_factory=dict)
    no_delivery_limit: bool = False
    existing_first: bool = False
    check_only: bool = False
    holds_retries: bool = False
    wishes: Headers = field(default_factory=dict)
    if_unequal: str | None = None
    if_missing: str | None = None
    is_consumed: bool = field(default=False, compare=False)

    def arguments_on(self, version: Version | None) -> Headers:
        """The arguments to declare it with first; the broker may refuse those of the wishes.

        Args:
            version: The version of RabbitMQ; None if it is unknown.
        """
        stated = version or ()
        wishes = self.wishes
        if stated < AT_LEAST_ONCE_SINCE and DEAD_LETTER_STRATEGY in wishes:
            # A broker that doesn't know the strategy ignores it, and keeps only the overflow.
            wishes = {name: wishes[name] for name in wishes if name not in AT_LEAST_ONCE}
        if self.no_delivery_limit and stated >= DEFAULT_LIMIT_SINCE:
            # Before 4.0 there is no default limit, and -1 makes the broker drop a message the first
            # time that it is redelivered.
            wishes = {DELIVERY_LIMIT: -1, **wishes}
        return {**wishes, **self.arguments}

    def arguments_after(self, refused: Headers, text: str) -> Headers | None:
        """The arguments to declare it with after a refusal (406); None if it stands.

        An existing queue may lack what is only wished for, or have other values of it.
        """
        unequal = unequal_argument(text)
        if unequal is None:
            # A classic queue refuses a delivery limit, for example, which it doesn't have anyway.
            # Whether a queue without a type is one depends on the virtual host.
            return None if refused == self.arguments else self.arguments
        name, current = unequal.name, unequal.value
        is_optional = name in self._optional or (
            self.is_consumed and (name, current) == (DELIVERY_LIMIT, -1)
        )
        # Each argument is changed only once: to what the queue has.
        if not is_optional or refused.get(name) not in (self.wishes.get(name), None):
            return None
        if current is not None:
            return {**refused, name: current}
        # The broker refuses a routing key without an exchange.
        gone = {name, DEAD_LETTER_ROUTING_KEY} if name == DEAD_LETTER_EXCHANGE else {name}
        return {each: value for each, value in refused.items() if each not in gone}

    @property
    def _optional(self) -> AbstractSet[str]:
        """The arguments in which an existing queue may differ."""
        more = BROKER_DEAD_LETTERS if self.is_consumed else frozenset[str]()
        return (self.wishes.keys() | more) - self.arguments.keys()

    def unfulfilled(self, accepted: Headers, version: Version | None) -> UnfulfilledWishes:
        """What the arguments with which the broker has accepted it don't fulfil."""
        wanted = self.arguments_on(version)
        names = self._optional
        return UnfulfilledWishes(
            {name: wanted[name] for name in names & wanted.keys() if name not in accepted},
            {
                name: accepted[name]
                for name in names & accepted.keys()
                if accepted[name] != wanted.get(name)
            },
        )


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding of a queue to an exchange."""

    queue: str
    exchange: str
    routing_key: str = ""
    arguments: Headers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PublishCheck:
    """An exchange that the user must be allowed to publish to, with a routing key that is used."""

    exchange: str
    routing_key: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Exchanges, queues and bindings, to declare in this order, and what to check then.

    Attributes:
        publishes: Checked last, without storing a message anywhere.
    """

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()
    publishes: tuple[PublishCheck, ...] = ()


def default_delivery_limit(version: Version | None) -> int | None:
    """The delivery limit of a quorum queue that is declared without one; None if it has none.

    Args:
        version: The broker's version; None if it is unknown, and taken for a new one.
    """
    is_old = version is not None and version < DEFAULT_LIMIT_SINCE
    return None if is_old else DEFAULT_DELIVERY_LIMIT


def delivery_limit(options: TopologyOptions) -> int | None:
    """The delivery limit that the consumer's queue is assumed to have; None if it has none.

    A limit by a policy isn't known, nor the version of the broker. A limit that is assumed too low
    does no harm: messages are held instead of being returned.
    """
    limit = options.queue_arguments.get(DELIVERY_LIMIT, DEFAULT_DELIVERY_LIMIT)
    return limit if isinstance(limit, int) and limit >= 0 else None


def build_topology(
    options: TopologyOptions, *, dead_letter_exchange_type: str | None = None
) -> Topology:
    """Everything that a consumer needs on its broker.

    Args:
        dead_letter_exchange_type: The type of the dead-letter exchange on the broker; None if it is
            missing or unknown.

    Raises:
        TopologyError: Dead letters wouldn't reach their queue.
    """
    check_only = not options.declare
    arguments: dict[str, FieldValue] = dict(options.queue_arguments)
    if options.queue_type is not None:
        arguments[QUEUE_TYPE] = options.queue_type
    dead_letter_exchange = _dead_letter_exchange(options)
    exchanges = [] if dead_letter_exchange is None else [dead_letter_exchange]
    queues: list[Queue] = []
    bindings: list[Binding] = []
    target = dead_letter_target(options)
    if options.dead_letter_queue is not None and target is not None:
        queue_type = effective_queue_type(options)
        queues.append(
            Queue(
                options.dead_letter_queue,
                arguments={} if queue_type is None else {QUEUE_TYPE: queue_type},
                # It has no dead-letter queue of its own for messages that it would drop.
                no_delivery_limit=queue_type != "classic",
                existing_first=True,
                check_only=check_only,
            )
        )
        if target.exchange and not check_only:
            bindings.extend(
                Binding(options.dead_letter_queue, target.exchange, key)
                for key in dead_letter_binding_keys(options, target, dead_letter_exchange_type)
            )
    if options.exchange_name:
        exchanges.append(
            Exchange(
                options.exchange_name,
                options.exchange_type,
                durable=options.exchange_durable,
                auto_delete=options.exchange_auto_delete,
                internal=options.exchange_internal,
                arguments=options.exchange_arguments,
                check_only=check_only,
            )
        )
    queues.append(
        Queue(
            options.queue_name,
            durable=options.queue_durable,
            exclusive=options.queue_exclusive,
            auto_delete=options.queue_auto_delete,
            arguments=arguments,
            wishes={} if check_only else broker_dead_letter_arguments(options),
            is_consumed=options.broker_dead_letters,
            check_only=check_only,
        )
    )
    queues.extend(wait_queue(options, level) for level in options.wait_levels)
    if options.exchange_name and not check_only:
        bindings.extend(
            Binding(options.queue_name, options.exchange_name, key, options.binding_arguments)
            for key in options.binding_keys
        )
    publishes = [PublishCheck("", options.queue_name)] if options.republishes else []
    if target is not None:
        # Some users may publish to a topic exchange only with certain routing keys.
        key = options.binding_keys[0] if target.routing_key is None else target.routing_key
        publishes.append(PublishCheck(target.exchange, key))
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings), tuple(publishes))


def _dead_letter_exchange(options: TopologyOptions) -> Exchange | None:
    """The exchange of the dead letters, unless it is the default one, or the consumer's own."""
    target = dead_letter_target(options)
    if target is None or target.exchange in ("", options.exchange_name):
        return None
    return Exchange(
        target.exchange,
        new_dead_letter_exchange_type(options, target.exchange),
        # An existing exchange isn't declared again: it may be shared, and of any type.
        existing_first=True,
        # Without a dead-letter queue it must exist, so that a wrong name is an error at the start.
        check_only=not options.declare or options.dead_letter_queue is None,
    )


def exchange_to_look_up(options: TopologyOptions) -> Exchange | None:
    """The exchange whose type on the broker decides how the dead-letter queue is bound, if any."""
    exchange = _dead_letter_exchange(options)
    return None if exchange is None or exchange.check_only else exchange


def wait_queue(options: TopologyOptions, level: int) -> Queue:
    """The queue in which messages wait for this many milliseconds before they return.

    Raises:
        TopologyError: Its name is too long for AMQP.
    """
    name = wait_queue_name(options.queue_name, level)
    if not is_short_string(name):
        raise TopologyError(
            f"queue {name!r} cannot be declared: its name has more than {SHORT_STRING} bytes;"
            " use a shorter queue_name, or no delays"
        )
    return Queue(
        name,
        arguments={
            # Without `x-expires`: a queue that expires drops its messages.
            MESSAGE_TTL: level,
            DEAD_LETTER_EXCHANGE: "",
            DEAD_LETTER_ROUTING_KEY: options.queue_name,
            # It keeps an expired message until the other queue has it. A classic queue would drop
            # it if the other queue is full.
            QUEUE_TYPE: "quorum",
            **AT_LEAST_ONCE,
        },
        check_only=not options.declare,
        holds_retries=True,
        if_unequal="it holds waiting messages, and was declared with other arguments: let the queue"
        " run empty and delete it",
    )


def parse_version(product: str, version: str) -> Version | None:
    """Parse the version that a broker states.

    Returns:
        None if it is another product, or states no version.
    """
    found = re.match(r"\d+(\.\d+)*", version) if product == "RabbitMQ" else None
    return None if found is None else tuple(map(int, found[0].split(".")))


def refuse_lossy_wait_queue(queue: Queue, product: str, version: str) -> None:
    """Refuse to declare a wait queue on a broker that could lose its messages.

    Raises:
        TopologyError: The queue must dead-letter at least once, and the broker is not known to
            support that.
    """
    # Old brokers accept arguments that they don't know, so a declaration proves nothing.
    if not queue.holds_retries:
        return
    stated = parse_version(product, version)
    if stated is not None and stated >= AT_LEAST_ONCE_SINCE:
        return
    since = ".".join(map(str, AT_LEAST_ONCE_SINCE))
    raise TopologyError(
        f"queue {queue.name!r}: {product} {version} may lose messages that wait for their next"
        f" attempt, if their queue is full or missing; RabbitMQ {since} and newer do not"
    )


def split_exclusive(topology: Topology) -> tuple[Topology, Topology]:
    """Separate exclusive queues, which a session must declare on its own connection.

    Returns:
        The shared part, and the exclusive queues with their bindings.
    """
    exclusive = {queue.name for queue in topology.queues if queue.exclusive}
    shared = Topology(
        topology.exchanges,
        tuple(queue for queue in topology.queues if queue.name not in exclusive),
        tuple(each for each in topology.bindings if each.queue not in exclusive),
        topology.publishes,
    )
    own = Topology(
        (),
        tuple(queue for queue in topology.queues if queue.name in exclusive),
        tuple(each for each in topology.bindings if each.queue in exclusive),
    )
    return shared, own


def to_definitions(topology: Topology, vhost: str, version: Version | None) -> dict[str, Any]:
    """Export a topology as definitions that RabbitMQ can import.

    Entities that must already exist, and exclusive queues, are left out.

    Args:
        vhost: The virtual host of all entities.
        version: The version of the RabbitMQ that will import them, see :meth:`Queue.arguments_on`.
    """
    shared, _ = split_exclusive(topology)
    return {
        "exchanges": [
            {
                "name": exchange.name,
                "vhost": vhost,
                "type": exchange.type,
                "durable": exchange.durable,
                "auto_delete": exchange.auto_delete,
                "internal": exchange.internal,
                "arguments": dict(exchange.arguments),
            }
            for exchange in shared.exchanges
            if exchange.name and not exchange.check_only
        ],
        "queues": [
            {
                "name": queue.name,
                "vhost": vhost,
                "durable": queue.durable,
                "auto_delete": queue.auto_delete,
                "arguments": _certain_arguments(queue, version),
            }
            for queue in shared.queues
            if not queue.check_only
        ],
        "bindings": [
            {
                "source": binding.exchange,
                "vhost": vhost,
                "destination": binding.queue,
                "destination_type": "queue",
                "routing_key": binding.routing_key,
                "arguments": dict(binding.arguments),
            }
            for binding in shared.bindings
            if binding.exchange
        ],
    }


def depends_on_version(topology: Topology) -> bool:
    """Whether the definitions depend on the version of the RabbitMQ that imports them."""
    oldest, newest = (), DEFAULT_LIMIT_SINCE
    return any(
        _certain_arguments(each, oldest) != _certain_arguments(each, newest)
        for each in topology.queues
    )


def _certain_arguments(queue: Queue, version: Version | None) -> dict[str, FieldValue]:
    """The arguments that a broker of this version accepts for a new queue."""
    arguments = dict(queue.arguments_on(version))
    if QUEUE_TYPE not in queue.arguments and DELIVERY_LIMIT not in queue.arguments:
        # The virtual host may make it a classic queue, which refuses the limit.
        arguments.pop(DELIVERY_LIMIT, None)
    return arguments
