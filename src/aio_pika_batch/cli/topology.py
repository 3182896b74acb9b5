"""The command `topology`: shows what a consumer needs on its broker, compares it, declares it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Literal, TypeAlias

from aio_pika_batch.cli.app import Exit, Flag
from aio_pika_batch.cli.logging import silence_clients
from aio_pika_batch.cli.printing import console, escaped, print_json, table
from aio_pika_batch.cli.targets import AnyConsumer, TargetOptions, load
from aio_pika_batch.core.dead_letter import format_header
from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.refusals import UnequalArgument, unequal_argument
from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    Queue,
    Topology,
    Version,
    build_topology,
    depends_on_version,
    exchange_to_look_up,
    parse_version,
    to_definitions,
)
from aio_pika_batch.core.topology_options import QUEUE_TYPE, TopologyOptions, refuse_loops
from aio_pika_batch.errors import ConfigurationError, TopologyError
from aio_pika_batch.settings.derived import topology_options, virtual_host
from aio_pika_batch.transport import InspectingTransport, Transport, VersionedTransport

Entity: TypeAlias = Exchange | Queue | Binding


class EntityState(Enum):
    """How an entity on the broker compares with what the consumer needs."""

    EXISTS = "exists"
    MISSING = "missing"
    DIFFERS = "differs"
    REFUSED = "refused"
    UNSEEN = "cannot be seen"


BAD = frozenset({EntityState.DIFFERS, EntityState.REFUSED})


@dataclass(frozen=True, slots=True)
class Comparison:
    """An entity and its state on the broker.

    Attributes:
        words: The broker's words, if it refused.
        lacking: The arguments that a queue should have and doesn't, although it can be used.
    """

    entity: Entity
    state: EntityState
    words: str = ""
    lacking: Headers = field(default_factory=dict)


def topology(
    target: str,
    /,
    *,
    apply: Flag = False,
    dry_run: Flag = False,
    format: Literal["table", "json", "definitions"] = "table",  # noqa: A002  -- its name on the command line
    rabbitmq: str | None = None,
    vhost: str | None = None,
    loading: TargetOptions | None = None,
) -> int:
    """Show the queues, exchanges and bindings that a consumer needs on its broker.

    Args:
        target: Consumer as module:attribute.
        apply: Declare everything, even if the consumer has declare=False.
        dry_run: Show what exists, is missing or differs on the broker, and declare nothing.
        format: Output format; definitions is for RabbitMQ to import.
        rabbitmq: RabbitMQ version that imports the definitions; by default that of the broker.
        vhost: Virtual host of the definitions; by default that of the consumer's URL.
        loading: How the consumer is found.
    """
    silence_clients()
    consumer = load(target, loading or TargetOptions())
    # What the consumer needs, whether or not it declares it itself.
    options = replace(topology_options(consumer.settings), declare=True)
    refuse_loops(options)
    if apply and dry_run:
        raise ConfigurationError("--apply and --dry-run contradict each other: use one of them")
    if format == "definitions":
        if apply or dry_run:
            msg = "--format definitions: cannot be combined with --apply or --dry-run"
            raise ConfigurationError(msg)
        where = vhost if vhost is not None else virtual_host(consumer.settings.url)
        needed = build_topology(options)
        version = _version(rabbitmq, consumer, needed)
        print(json.dumps(to_definitions(needed, where, version), indent=2))
        return Exit.OK
    return asyncio.run(_show(consumer, options, apply=apply, dry_run=dry_run, format=format))


async def _show(
    consumer: AnyConsumer,
    options: TopologyOptions,
    *,
    apply: bool,
    dry_run: bool,
    format: str,  # noqa: A002  -- as above
) -> Exit:
    transport = consumer._transport  # noqa: SLF001  -- same package
    kind = await look_up_type(transport, options) if apply or dry_run else None
    needed = build_topology(options, dead_letter_exchange_type=kind)
    if apply:
        await transport.declare(replace(needed, publishes=()))
    compared: list[Comparison] = []
    if apply or dry_run:
        compared = await compare(transport, needed)
    if format == "json":
        print_json(
            [
                {**_row(each.entity), "state": each.state.value, "words": each.words}
                for each in compared
            ]
            or [_row(entity) for entity in _entities(needed)]
        )
    else:
        _print(needed, compared)
        if apply:
            console().print("Declared.")
    return Exit.FAILED if any(each.state in BAD for each in compared) else Exit.OK


def _entities(topology: Topology) -> Iterator[Entity]:
    """Return everything but the default exchange, which every broker has."""
    yield from (exchange for exchange in topology.exchanges if exchange.name)
    yield from topology.queues
    yield from (binding for binding in topology.bindings if binding.exchange)


def title(entity: Entity) -> tuple[str, str]:
    """Return the kind of an entity and its name."""
    match entity:
        case Exchange():
            return "exchange", entity.name
        case Queue():
            return "queue", entity.name
        case Binding():
            return "binding", f"{entity.exchange} → {entity.queue}"


def _print(needed: Topology, compared: list[Comparison]) -> None:
    made = table("what", "name", "details", *(["state"] if compared else []))
    for each in compared or [Comparison(each, EntityState.UNSEEN) for each in _entities(needed)]:
        state = [each.state.value] if compared else []
        made.add_row(*title(each.entity), escaped(_details(each.entity)), *state)
    console().print(made)
    for each in compared:
        if each.state in BAD:
            console().print(escaped(each.words))


def _details(entity: Entity) -> str:
    match entity:
        case Exchange():
            words = ["must exist"] if entity.check_only else [entity.type]
        case Queue():
            words = []
            if entity.exclusive:
                words.append("exclusive")
        case Binding():
            words = [f"key {entity.routing_key!r}"]
    if not isinstance(entity, Binding):
        words += [] if entity.durable else ["transient"]
        words += ["auto-delete"] if entity.auto_delete else []
    if isinstance(entity, Exchange) and entity.internal:
        words.append("internal")
    arguments = dict(entity.arguments)
    if isinstance(entity, Queue) and entity.wishes:
        arguments |= entity.wishes[0]
    words += [f"{name}={format_header(value)}" for name, value in arguments.items()]
    if isinstance(entity, Queue) and entity.no_delivery_limit:
        words.append("no delivery limit")
    return ", ".join(words)


def _row(entity: Entity) -> dict[str, object]:
    return {"what": title(entity)[0], **asdict(entity)}


def _version(stated: str | None, consumer: AnyConsumer, needed: Topology) -> Version | None:
    if stated is not None:
        version = parse_version("RabbitMQ", stated)
        if version is None:
            msg = f"--rabbitmq: {stated!r} is not a version; write it as 4.0"
            raise ConfigurationError(msg)
        return version
    if not depends_on_version(needed):
        return None
    return asyncio.run(broker_version(consumer._transport))  # noqa: SLF001  -- same package


# --- comparing -------------------------------------------------------------------


async def compare(transport: Transport, topology: Topology) -> list[Comparison]:
    """Compare a topology with the broker. Bindings can't be seen over AMQP.

    Raises:
        TransportError: The broker is unreachable, or refuses access.
    """
    return [
        *[await _compare(transport, each) for each in topology.exchanges if each.name],
        *[await _compare(transport, each) for each in topology.queues],
        *[Comparison(each, EntityState.UNSEEN) for each in topology.bindings if each.exchange],
    ]


async def broker_version(transport: Transport) -> Version | None:
    """Return the version of RabbitMQ; None if it is unknown.

    Raises:
        TransportError: The broker is unreachable, or refuses access.
    """
    await transport.declare(Topology(exchanges=(Exchange("amq.direct", check_only=True),)))
    return transport.broker_version if isinstance(transport, VersionedTransport) else None


async def look_up_type(transport: Transport, options: TopologyOptions) -> str | None:
    """Return the type that the dead-letter exchange has on the broker; None if it is unknown.

    Raises:
        TransportError: The broker is unreachable, or refuses access.
    """
    exchange = exchange_to_look_up(options)
    if exchange is None or not isinstance(transport, InspectingTransport):
        return None
    return await transport.exchange_type(exchange)


MOST_ARGUMENTS = 20
"""Arguments of a queue that are looked at. Each one takes a connection."""

_ONLY_OF_STREAMS: Headers = {"x-max-age": "1h"}
"""The broker ignores it in a declaration of an existing queue of another type, and refuses it for a
new one."""


async def look_up_arguments(transport: Transport, name: str) -> dict[str, FieldValue]:
    """Return the arguments of an existing queue with its type, as far as the broker tells them.

    Raises:
        TransportError: The broker is unreachable, or refuses access.
    """
    # AMQP can't read them. But if an existing queue is declared with other arguments, the broker
    # says how one of them differs. Nothing is created: no broker accepts these declarations.
    known: dict[str, FieldValue] = {}
    queue = Queue(name)
    while len(known) < MOST_ARGUMENTS and known.get(QUEUE_TYPE) != "stream":
        arguments = {QUEUE_TYPE: "no-such-type", **known, **_ONLY_OF_STREAMS}
        try:
            await transport.declare(_only(replace(queue, arguments=arguments)))
        except TopologyError as error:
            match unequal_argument(str(error)):
                case UnequalArgument("durable", value):
                    queue = replace(queue, durable=value == "true")
                case UnequalArgument("auto_delete", value):
                    queue = replace(queue, auto_delete=value == "true")
                case UnequalArgument(argument, value) if argument not in known:
                    # Before 4.0 a classic queue may have no type.
                    known[argument] = "classic" if argument == QUEUE_TYPE and not value else value
                case _:
                    break
        else:
            break
    return known


async def _compare(transport: Transport, entity: Exchange | Queue) -> Comparison:
    if isinstance(entity, Queue) and entity.exclusive:
        return Comparison(entity, EntityState.UNSEEN, "each session declares its own")
    # Passively first: only what exists is declared as it should be, so nothing is created.
    try:
        await transport.declare(_only(replace(entity, check_only=True)))
    except TopologyError as error:
        words = str(error)
        # The error has no code of its own, but the broker's words have (AMQP 0-9-1, 404).
        missing = "404" in words or "NOT_FOUND" in words
        return Comparison(entity, EntityState.MISSING if missing else EntityState.REFUSED, words)
    # Such an entity is used as it is, so that nothing can differ.
    if entity.existing_first or entity.check_only:
        return Comparison(entity, EntityState.EXISTS)
    try:
        report = await transport.declare(_only(entity))
    except TopologyError as error:
        return Comparison(entity, EntityState.DIFFERS, str(error))
    lacking = {} if report is None else report.lacking.get(entity.name, {})
    return Comparison(entity, EntityState.EXISTS, lacking=lacking)


def _only(entity: Exchange | Queue) -> Topology:
    if isinstance(entity, Queue):
        return Topology(queues=(entity,))
    return Topology(exchanges=(entity,))
