"""The queues, exchanges and bindings that a consumer needs, as data.

Adapters declare them. They can also be exported as definitions for `rabbitmqctl import_definitions`
and *Import definitions* in the management UI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aio_pika_batch.core.message import SHORT_STRING, FieldValue, Headers, is_short_string
from aio_pika_batch.core.retry import wait_queue_name
from aio_pika_batch.core.settlement_plan import DeadLetterTarget
from aio_pika_batch.errors import TopologyError

QUEUE_TYPE = "x-queue-type"
DEAD_LETTER_EXCHANGE = "x-dead-letter-exchange"
DEAD_LETTER_ROUTING_KEY = "x-dead-letter-routing-key"
DEAD_LETTER_STRATEGY = "x-dead-letter-strategy"
DELIVERY_LIMIT = "x-delivery-limit"
MESSAGE_TTL = "x-message-ttl"

Version: TypeAlias = tuple[int, ...]
"""A version of RabbitMQ, for comparisons."""

AT_LEAST_ONCE_SINCE: Version = (3, 10)
"""The first RabbitMQ whose quorum queues keep an expired message until the next queue has it."""

DEFAULT_LIMIT_SINCE: Version = (4, 0)
"""The first RabbitMQ whose quorum queues have a delivery limit by default."""

DEFAULT_DELIVERY_LIMIT = 20
"""That limit."""

_UNEQUAL_WAIT_QUEUE = (
    "it holds waiting messages, and was declared with other arguments: let the queue run empty and"
    " delete it"
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange.

    Attributes:
        type: `direct`, `fanout`, `topic`, `headers`, or the `x-…` type of a plugin.
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


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue; the other flags are those of :class:`Exchange`.

    Attributes:
        no_delivery_limit: The broker must not drop a message because of its number of deliveries.
            The argument for this depends on the broker, see :meth:`arguments_on`.
        holds_retries: Messages wait in it for their next attempt, and must not get lost.
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

    @property
    def if_unequal(self) -> str | None:
        """Advice for when the broker has it with other arguments; None: as for any queue."""
        return _UNEQUAL_WAIT_QUEUE if self.holds_retries else None

    def arguments_on(self, version: Version | None) -> Headers:
        """The arguments to declare it with on this version of RabbitMQ; None if it is unknown."""
        if not self.no_delivery_limit or version is None or version < DEFAULT_LIMIT_SINCE:
            # Before 4.0 there is no default limit, and -1 makes the broker drop a message the first
            # time that it is redelivered.
            return self.arguments
        return {DELIVERY_LIMIT: -1, **self.arguments}


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding of a queue to an exchange."""

    queue: str
    exchange: str
    routing_key: str = ""
    arguments: Headers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Topology:
    """Exchanges, queues and bindings, to declare in this order."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyOptions:
    """The settings of a consumer that concern its topology, by their names.

    Attributes:
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
    routing_keys: tuple[str, ...] = ()
    binding_arguments: Mapping[str, FieldValue] = field(default_factory=dict)
    dead_letter_exchange: str | None = None
    dead_letter_exchange_type: str = "fanout"
    dead_letter_routing_key: str | None = None
    dead_letter_queue: str | None = None
    wait_levels: tuple[int, ...] = ()
    declare: bool = True


def effective_queue_type(options: TopologyOptions) -> str | None:
    """The queue type to declare; None uses the default of the virtual host."""
    return options.queue_type or _stated(options, QUEUE_TYPE)


def dead_letter_target(options: TopologyOptions) -> DeadLetterTarget | None:
    """Where this library publishes dead letters; None if no exchange is configured."""
    exchange, routing_key = options.dead_letter_exchange, options.dead_letter_routing_key
    if exchange is None:
        exchange = _stated(options, DEAD_LETTER_EXCHANGE)
        if exchange is not None and routing_key is None:
            routing_key = _stated(options, DEAD_LETTER_ROUTING_KEY)
    if exchange is None and options.dead_letter_queue is not None:
        exchange = f"{options.queue_name}.dlx"
    if exchange is None:
        return None
    if not exchange and routing_key is None:
        # The default exchange routes by the name of a queue: an original routing key would miss
        # this queue, and could even lead back to the queue that the message comes from.
        routing_key = options.dead_letter_queue
    return DeadLetterTarget(exchange, routing_key)


def _stated(options: TopologyOptions, name: str) -> str | None:
    value = options.queue_arguments.get(name)
    return value if isinstance(value, str) else None


def build_topology(options: TopologyOptions) -> Topology:
    """Everything that a consumer needs on its broker."""
    check_only = not options.declare
    arguments: dict[str, FieldValue] = dict(options.queue_arguments)
    if options.queue_type is not None:
        arguments[QUEUE_TYPE] = options.queue_type
    exchanges: list[Exchange] = []
    queues: list[Queue] = []
    bindings: list[Binding] = []
    target = dead_letter_target(options)
    if target is not None and target.exchange:
        # An existing exchange isn't declared again: it may be shared, and of any type. Without a
        # dead-letter queue it must exist, so that a wrong name is an error at the start.
        exchanges.append(
            Exchange(
                target.exchange,
                options.dead_letter_exchange_type,
                existing_first=True,
                check_only=check_only or options.dead_letter_queue is None,
            )
        )
    if options.dead_letter_queue is not None and target is not None:
        queue_type = effective_queue_type(options)
        queues.append(
            Queue(
                options.dead_letter_queue,
                arguments={} if queue_type is None else {QUEUE_TYPE: queue_type},
                # It has no dead-letter queue of its own for messages that it would drop.
                no_delivery_limit=queue_type == "quorum",
                existing_first=True,
                check_only=check_only,
            )
        )
        if target.exchange and not check_only:
            bindings.extend(
                Binding(options.dead_letter_queue, target.exchange, key)
                for key in _dead_letter_keys(options, target)
            )
    if options.exchange_name:
        exchanges.append(
            Exchange(
                options.exchange_name,
                options.exchange_type,
                durable=options.exchange_durable,
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
            check_only=check_only,
        )
    )
    queues.extend(wait_queue(options, level) for level in options.wait_levels)
    if options.exchange_name and not check_only:
        bindings.extend(
            Binding(options.queue_name, options.exchange_name, key, options.binding_arguments)
            for key in _routing_keys(options)
        )
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))


def wait_queue(options: TopologyOptions, level: int) -> Queue:
    """The queue in which messages wait for so many milliseconds before they return.

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
            DEAD_LETTER_STRATEGY: "at-least-once",
            "x-overflow": "reject-publish",
        },
        check_only=not options.declare,
        holds_retries=True,
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
    )
    own = Topology(
        (),
        tuple(queue for queue in topology.queues if queue.name in exclusive),
        tuple(each for each in topology.bindings if each.queue in exclusive),
    )
    return shared, own


def _routing_keys(options: TopologyOptions) -> tuple[str, ...]:
    return options.routing_keys or (options.queue_name,)


def _dead_letter_keys(options: TopologyOptions, target: DeadLetterTarget) -> tuple[str, ...]:
    """Every routing key that a dead letter can have, so that all reach the dead-letter queue."""
    if target.routing_key is not None:
        return (target.routing_key,)
    match options.dead_letter_exchange_type:
        case "fanout" | "headers":
            return ("",)
        case "topic":
            return ("#",)
        case _:
            # Messages from the default exchange have the name of the queue as their routing key.
            return tuple(dict.fromkeys((*_routing_keys(options), options.queue_name)))


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
                "internal": False,
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
                "arguments": dict(queue.arguments_on(version)),
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
    return any(queue.no_delivery_limit for queue in topology.queues)
