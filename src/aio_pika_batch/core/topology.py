"""Which queues, exchanges and bindings does a consumer need?

As data: an adapter declares it, on channels of its own, and `check_only` asks for nothing to be
created.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.routing import DeadLetterTarget

QUEUE_TYPE = "x-queue-type"
DEAD_LETTER_EXCHANGE = "x-dead-letter-exchange"
DEAD_LETTER_ROUTING_KEY = "x-dead-letter-routing-key"


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
    """A queue; the flags are those of :class:`Exchange`."""

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Headers = field(default_factory=dict)
    existing_first: bool = False
    check_only: bool = False


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
class Wanted:
    """What a consumer's settings say about its queue; the names are those of the settings."""

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
    declare: bool = True


def effective_queue_type(wanted: Wanted) -> str | None:
    """The queue type that will be asked for; None leaves it to the virtual host's default."""
    return wanted.queue_type or _stated(wanted, QUEUE_TYPE)


def dead_letter_target(wanted: Wanted) -> DeadLetterTarget | None:
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


def _stated(wanted: Wanted, name: str) -> str | None:
    value = wanted.queue_arguments.get(name)
    return value if isinstance(value, str) else None


def derive(wanted: Wanted) -> Topology:
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
    if wanted.exchange_name and not check_only:
        bindings.extend(
            Binding(wanted.queue_name, wanted.exchange_name, key, wanted.binding_arguments)
            for key in _routing_keys(wanted)
        )
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))


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


def _routing_keys(wanted: Wanted) -> tuple[str, ...]:
    return wanted.routing_keys or (wanted.queue_name,)


def _dead_letter_keys(wanted: Wanted, target: DeadLetterTarget) -> tuple[str, ...]:
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
