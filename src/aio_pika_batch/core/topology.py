"""Which queues, exchanges and bindings does a consumer need?

As data: an adapter declares it, on channels of its own, and `check_only` asks for nothing to be
created.
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

Version: TypeAlias = tuple[int, ...]
"""Of a RabbitMQ, to be compared."""

AT_LEAST_ONCE_SINCE: Version = (3, 10)
"""The first RabbitMQ whose quorum queues keep what expires until it is taken."""

DEFAULT_LIMIT_SINCE: Version = (4, 0)
"""The first RabbitMQ whose quorum queues have a delivery limit that nobody has asked for."""

_UNEQUAL_WAIT_QUEUE = (
    "it holds messages that wait, and was declared otherwise than now, say with another"
    " unsafe_delay: set that back, or let the queue run empty and delete it"
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange.

    Attributes:
        type: `direct`, `fanout`, `topic`, `headers`, or a plugin's `x-…`.
        existing_first: Take one that exists as it is, and create it only if there is none.
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
        unlimited: Its broker shall not drop a message for having been delivered too often. How to
            say so depends on the broker, see :meth:`arguments_on`.
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
        """What to do if the broker has it with other arguments; None: as for any queue."""
        return _UNEQUAL_WAIT_QUEUE if self.holds_retries else None

    def arguments_on(self, version: Version | None) -> Headers:
        """What to declare it with, on a RabbitMQ of this version; None if that is not known."""
        if not self.no_delivery_limit or version is None or version < DEFAULT_LIMIT_SINCE:
            # Before 4.0 there is no limit to lift, and -1 is one that every message exceeds.
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
    """What to declare, in this order: exchanges, queues, bindings."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyOptions:
    """What a consumer's settings say about its queue; the names are those of the settings.

    Attributes:
        wait_levels: The milliseconds of each wait queue that is there from the start.
    """

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
    unsafe_delay: bool = False
    declare: bool = True


def effective_queue_type(wanted: TopologyOptions) -> str | None:
    """The queue type that will be asked for; None leaves it to the virtual host's default."""
    return wanted.queue_type or _stated(wanted, QUEUE_TYPE)


def dead_letter_target(wanted: TopologyOptions) -> DeadLetterTarget | None:
    """Where this library publishes dead letters to; None if nobody has named an exchange."""
    exchange, routing_key = wanted.dead_letter_exchange, wanted.dead_letter_routing_key
    if exchange is None:
        exchange = _stated(wanted, DEAD_LETTER_EXCHANGE)
        if exchange is not None and routing_key is None:
            routing_key = _stated(wanted, DEAD_LETTER_ROUTING_KEY)
    if exchange is None and wanted.dead_letter_queue is not None:
        exchange = f"{wanted.queue_name}.dlx"
    if exchange is None:
        return None
    if not exchange and routing_key is None:
        # The default exchange routes by the name of a queue: an original key misses this one, and
        # may even lead back to the queue that the message comes from.
        routing_key = wanted.dead_letter_queue
    return DeadLetterTarget(exchange, routing_key)


def _stated(wanted: TopologyOptions, name: str) -> str | None:
    value = wanted.queue_arguments.get(name)
    return value if isinstance(value, str) else None


def build_topology(wanted: TopologyOptions) -> Topology:
    """Everything that a consumer needs on its broker."""
    check_only = not wanted.declare
    arguments: dict[str, FieldValue] = dict(wanted.queue_arguments)
    if wanted.queue_type is not None:
        arguments[QUEUE_TYPE] = wanted.queue_type
    exchanges: list[Exchange] = []
    queues: list[Queue] = []
    bindings: list[Binding] = []
    target = dead_letter_target(wanted)
    if target is not None and target.exchange:
        # Never re-declared where it exists: it may be shared, and of any type.
        exchanges.append(
            Exchange(
                target.exchange,
                wanted.dead_letter_exchange_type,
                existing_first=True,
                check_only=check_only or wanted.dead_letter_queue is None,
            )
        )
    if wanted.dead_letter_queue is not None and target is not None:
        queue_type = effective_queue_type(wanted)
        queues.append(
            Queue(
                wanted.dead_letter_queue,
                arguments={} if queue_type is None else {QUEUE_TYPE: queue_type},
                # Nothing stands behind it that would catch what it drops.
                no_delivery_limit=queue_type == "quorum",
                existing_first=True,
                check_only=check_only,
            )
        )
        if target.exchange and not check_only:
            bindings.extend(
                Binding(wanted.dead_letter_queue, target.exchange, key)
                for key in _dead_letter_keys(wanted, target)
            )
    if wanted.exchange_name:
        exchanges.append(
            Exchange(
                wanted.exchange_name,
                wanted.exchange_type,
                durable=wanted.exchange_durable,
                check_only=check_only,
            )
        )
    queues.append(
        Queue(
            wanted.queue_name,
            durable=wanted.queue_durable,
            exclusive=wanted.queue_exclusive,
            auto_delete=wanted.queue_auto_delete,
            arguments=arguments,
            check_only=check_only,
        )
    )
    queues.extend(wait_queue(wanted, level) for level in wanted.wait_levels)
    if wanted.exchange_name and not check_only:
        bindings.extend(
            Binding(wanted.queue_name, wanted.exchange_name, key, wanted.binding_arguments)
            for key in _routing_keys(wanted)
        )
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))


def wait_queue(wanted: TopologyOptions, level: int) -> Queue:
    """The queue in which messages wait for so many milliseconds before they come back.

    A quorum queue that keeps what expires until the other queue has taken it. It never expires
    itself: an expired queue takes its messages along.

    Raises:
        TopologyError: AMQP has no place for its name.
    """
    name = wait_queue_name(wanted.queue_name, level)
    if not is_short_string(name):
        raise TopologyError(
            f"queue {name!r} cannot be declared: its name has more than {SHORT_STRING} bytes;"
            " use a shorter queue_name, or no delays"
        )
    arguments: dict[str, FieldValue] = {
        "x-message-ttl": level,
        DEAD_LETTER_EXCHANGE: "",
        DEAD_LETTER_ROUTING_KEY: wanted.queue_name,
    }
    if wanted.unsafe_delay:
        arguments[QUEUE_TYPE] = "classic"
    else:
        arguments |= {
            QUEUE_TYPE: "quorum",
            DEAD_LETTER_STRATEGY: "at-least-once",
            "x-overflow": "reject-publish",
        }
    return Queue(
        name,
        arguments=arguments,
        check_only=not wanted.declare,
        holds_retries=True,
    )


def parse_version(product: str, version: str) -> Version | None:
    """What a broker says of itself, to be compared.

    Returns:
        None if it is another product, whose numbers mean something else, or does not say.
    """
    found = re.match(r"\d+(\.\d+)*", version) if product == "RabbitMQ" else None
    return None if found is None else tuple(map(int, found[0].split(".")))


def refuse_lossy_wait_queue(queue: Queue, product: str, version: str) -> None:
    """Refuse a wait queue on a broker that would declare it, and then lose what is in it.

    Raises:
        TopologyError: It was to dead-letter at least once, and older brokers do not know that; nor
            is it known of brokers that are no RabbitMQ.
    """
    if not queue.holds_retries or DEAD_LETTER_STRATEGY not in queue.arguments:
        return
    stated = parse_version(product, version)
    if stated is not None and stated >= AT_LEAST_ONCE_SINCE:
        return
    since = ".".join(map(str, AT_LEAST_ONCE_SINCE))
    raise TopologyError(
        f"queue {queue.name!r}: {product} {version} may lose messages that wait for their next"
        f" attempt, when their queue is full or not there; RabbitMQ {since} and newer do not."
        " Upgrade, or do without delays, or set unsafe_delay=True to take the risk"
    )


def split_exclusive(topology: Topology) -> tuple[Topology, Topology]:
    """Separate what any connection may declare from what a session declares for itself.

    Returns:
        The shared part; and the exclusive queues with their bindings.
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


def _routing_keys(wanted: TopologyOptions) -> tuple[str, ...]:
    return wanted.routing_keys or (wanted.queue_name,)


def _dead_letter_keys(wanted: TopologyOptions, target: DeadLetterTarget) -> tuple[str, ...]:
    """Every key that a dead letter may come with, so that none misses the dead-letter queue."""
    if target.routing_key is not None:
        return (target.routing_key,)
    match wanted.dead_letter_exchange_type:
        case "fanout" | "headers":
            return ("",)
        case "topic":
            return ("#",)
        case _:
            # What came by the default exchange, or was requeued by hand, has the queue's name.
            return tuple(dict.fromkeys((*_routing_keys(wanted), wanted.queue_name)))


def to_definitions(topology: Topology, vhost: str, version: Version | None) -> dict[str, Any]:
    """A topology as definitions.

    Args:
        vhost: The virtual host that it is for.
        version: Of the RabbitMQ that shall import it: a delivery limit is lifted in its own words.
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
    """Whether it has to be known which RabbitMQ shall import it."""
    return any(queue.no_delivery_limit for queue in topology.queues)
