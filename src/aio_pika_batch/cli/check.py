"""The commands `check` and `topology`: show what a consumer needs, compare it with its broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Literal, TypeAlias
from uuid import uuid4

from rich.text import Text

from aio_pika_batch.cli.app import Exit, Flag
from aio_pika_batch.cli.logging import silence_clients
from aio_pika_batch.cli.printing import console, escaped, print_json, print_table
from aio_pika_batch.cli.targets import AnyConsumer, TargetOptions, load
from aio_pika_batch.core.config_checks import (
    amqp10_hint,
    amqp10_warnings_for,
    broker_warnings_for,
    clock_warning,
    dead_letter_queue_warnings,
    delays_natively,
    existing_queue_warnings,
    hints_for,
    warnings_for,
)
from aio_pika_batch.core.dead_letter import death_info, format_header
from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.core.refusals import STREAM_ADVICE, UnequalArgument, unequal_argument
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    Queue,
    Topology,
    UnfulfilledWishes,
    Version,
    build_topology,
    depends_on_version,
    exchange_to_look_up,
    parse_version,
    to_definitions,
)
from aio_pika_batch.core.topology_options import (
    DEAD_LETTER_EXCHANGE,
    DEAD_LETTER_ROUTING_KEY,
    QUEUE_TYPE,
    TopologyOptions,
    policy_command,
    refuse_loops,
)
from aio_pika_batch.errors import AccessRefused, ConfigurationError, TopologyError
from aio_pika_batch.masking import mask_url
from aio_pika_batch.settings import plain_url
from aio_pika_batch.settings.derived import (
    consumer_profile,
    has_adaptive_prefetch,
    topology_options,
    virtual_host,
)
from aio_pika_batch.transport import (
    InspectingTransport,
    Subscription,
    Transport,
    VersionedTransport,
)

Level = Literal["error", "warning", "info"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """A finding: what is wrong, and what to do about it."""

    level: Level
    text: str


def check(
    target: str,
    /,
    *,
    format: Literal["table", "json"] = "table",  # noqa: A002  -- its name on the command line
    offline: Flag = False,
    strict: Flag = False,
    loading: TargetOptions | None = None,
) -> int:
    """Show a consumer's settings and compare them with the broker. Declares nothing.

    Args:
        target: Consumer as module:attribute.
        format: Output format.
        offline: Check the settings only, without connecting to the broker.
        strict: Exit with 1 for warnings too.
        loading: How the consumer is found.
    """
    silence_clients()
    loading = loading or TargetOptions()
    consumer = load(target, loading)
    rows = _settings(consumer, url_given=loading.url is not None)
    findings = _offline(consumer) if offline else asyncio.run(_findings(consumer))
    if format == "json":
        print_json(
            {
                "consumer": type(consumer).__name__,
                "settings": {name: {"value": v, "from": source} for name, v, source in rows},
                "findings": [{"level": each.level, "text": each.text} for each in findings],
            }
        )
    else:
        _print_check(rows, findings)
    bad = {"error", "warning"} if strict else {"error"}
    return Exit.FAILED if any(each.level in bad for each in findings) else Exit.OK


def _settings(consumer: AnyConsumer, *, url_given: bool) -> list[tuple[str, object, str]]:
    settings = consumer.settings
    sources = settings.provenance
    values = settings.model_dump(mode="json", fallback=str)
    # Passwords of other settings are masked by their type.
    values["url"] = mask_url(plain_url(settings))
    rows = [
        (name, value, "command line" if name == "url" and url_given else sources[name])
        for name, value in values.items()
    ]
    return [
        *rows,
        ("(effective prefetch)", settings.effective_prefetch, "derived"),
        ("(adaptive prefetch)", has_adaptive_prefetch(settings), "derived"),
        ("(costs most CPU)", consumer._costliest_setting, "derived"),  # noqa: SLF001  -- same package
        ("(effective stuck_after)", settings.effective_stuck_after, "derived"),
    ]


def _offline(consumer: AnyConsumer) -> list[CheckFinding]:
    options = topology_options(consumer.settings)
    try:
        _topology(options, None)
    except (ConfigurationError, TopologyError) as error:
        return [CheckFinding("error", str(error)), *_warnings(consumer)]
    return _warnings(consumer)


def _topology(options: TopologyOptions, dead_letter_exchange_type: str | None) -> Topology:
    refuse_loops(options)
    return build_topology(options, dead_letter_exchange_type=dead_letter_exchange_type)


def _warnings(consumer: AnyConsumer) -> list[CheckFinding]:
    profile = consumer_profile(consumer.settings, consumer.exception_results.values())
    options = topology_options(consumer.settings)
    found = [*warnings_for(options, profile), *hints_for(options, profile)]
    lines = [*consumer.settings.ignored_variables, *found]
    return [CheckFinding("warning", line) for line in lines]


async def _findings(consumer: AnyConsumer) -> list[CheckFinding]:
    transport = consumer._transport  # noqa: SLF001  -- same package
    options = topology_options(consumer.settings)
    profile = consumer_profile(consumer.settings, consumer.exception_results.values())
    version = await broker_version(transport)
    try:
        needed = _topology(options, await look_up_type(transport, options))
    except (ConfigurationError, TopologyError) as error:
        return [CheckFinding("error", str(error)), *_warnings(consumer)]
    compared = await compare(transport, needed)
    vhost = virtual_host(plain_url(consumer.settings))
    hint = amqp10_hint(options, profile, version)
    clock = None
    if delays_natively(options, profile, version):
        clock = clock_warning(await clock_difference(transport))
    return [
        *(found for each in compared if (found := _finding(each, vhost)) is not None),
        *await _existing_queues(transport, options, compared, version),
        *await _permissions(transport, needed),
        *_warnings(consumer),
        *(CheckFinding("warning", line) for line in broker_warnings_for(options, profile, version)),
        *(CheckFinding("warning", line) for line in amqp10_warnings_for(options, profile, version)),
        *([] if clock is None else [CheckFinding("warning", clock)]),
        *([] if hint is None else [CheckFinding("info", hint)]),
    ]


async def _existing_queues(
    transport: Transport,
    options: TopologyOptions,
    compared: list[Comparison],
    version: Version | None,
) -> list[CheckFinding]:
    """Point out what the arguments of queues mean that are used as they are."""
    lines: list[str] = []
    for each in compared:
        entity = each.entity
        if not isinstance(entity, Queue) or each.state is not EntityState.EXISTS:
            continue
        if not (entity.check_only or entity.existing_first):
            continue
        arguments = await look_up_arguments(transport, entity.name)
        if arguments.get(QUEUE_TYPE) == "stream":
            return [CheckFinding("error", f"queue {entity.name!r}: {STREAM_ADVICE}")]
        if entity.name == options.dead_letter_queue:
            lines += dead_letter_queue_warnings(options, arguments, version)
        elif entity.name == options.queue_name:
            lines += existing_queue_warnings(options, arguments)
    return [CheckFinding("warning", line) for line in lines]


async def _permissions(transport: Transport, needed: Topology) -> list[CheckFinding]:
    findings = []
    for check in needed.publishes:
        try:
            await transport.declare(Topology(publishes=(check,)))
        except TopologyError as error:
            # A missing exchange is one of the other findings.
            if "404" not in str(error):
                findings.append(CheckFinding("error", str(error)))
    return findings


def _finding(comparison: Comparison, vhost: str) -> CheckFinding | None:
    entity = comparison.entity
    match comparison.state:
        case EntityState.EXISTS if comparison.unfulfilled.differing and isinstance(entity, Queue):
            found = ", ".join(
                f"{name}={value!r}" for name, value in comparison.unfulfilled.differing.items()
            )
            return CheckFinding(
                "warning",
                f"queue {entity.name!r} exists with {found}: what the broker gives up goes"
                " elsewhere; delete the queue, or set broker_dead_letters=False",
            )
        case EntityState.EXISTS if comparison.unfulfilled and isinstance(entity, Queue):
            lacking = comparison.unfulfilled.lacking
            names = ", ".join(lacking)
            command = policy_command(entity.name, lacking, vhost)
            return CheckFinding(
                "warning",
                f"queue {entity.name!r} exists without {names}: what the broker gives up may be"
                f" lost; add a policy: {command} (broker_dead_letters=False ends this warning)",
            )
        case EntityState.EXISTS | EntityState.UNSEEN:
            return None
        # The consumer would not create it either: it has declare=False, or the exchange must exist.
        case EntityState.MISSING if not isinstance(entity, Binding) and entity.check_only:
            return CheckFinding("error", comparison.words)
        case EntityState.MISSING:
            what = " ".join(title(entity))
            return CheckFinding("info", f"{what} does not exist yet: the consumer will declare it")
        case EntityState.DIFFERS | EntityState.REFUSED:
            return CheckFinding("error", comparison.words)


def _print_check(rows: list[tuple[str, object, str]], findings: list[CheckFinding]) -> None:
    out = console()
    print_table(
        ["setting", "value", "from"],
        ((name, "" if value is None else value, source) for name, value, source in rows),
    )
    out.print()
    for each in findings:
        out.print(Text(each.level, _STYLES[each.level]).append(":", "not bold"), escaped(each.text))
    if not findings:
        out.print("No problems found.")


# --- topology --------------------------------------------------------------------

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
        unfulfilled: What a queue was declared without, although it can be used.
    """

    entity: Entity
    state: EntityState
    words: str = ""
    unfulfilled: UnfulfilledWishes = field(default_factory=UnfulfilledWishes)


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
            raise ConfigurationError(
                "--format definitions: cannot be combined with --apply or --dry-run"
            )
        where = vhost if vhost is not None else virtual_host(plain_url(consumer.settings))
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
    connects = apply or dry_run
    kind = await look_up_type(transport, options) if connects else None
    needed = build_topology(options, dead_letter_exchange_type=kind)
    if apply:
        await transport.declare(replace(needed, publishes=()))
    compared = await compare(transport, needed) if connects else []
    if format == "json":
        rows = [{"what": title(each)[0], **asdict(each)} for each in _entities(needed)]
        for row, each in zip(rows, compared, strict=bool(compared)):
            row |= {"state": each.state.value, "words": each.words}
        print_json(rows)
    else:
        _print_topology(needed, compared)
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


def _print_topology(needed: Topology, compared: list[Comparison]) -> None:
    rows = [[*title(each), _details(each)] for each in _entities(needed)]
    for row, each in zip(rows, compared, strict=bool(compared)):
        row.append(each.state.value)
    print_table(["what", "name", "details", *(["state"] if compared else [])], rows)
    for each in compared:
        if each.state in BAD:
            console().print(escaped(each.words))


def _details(entity: Entity) -> str:
    match entity:
        case Exchange():
            words = ["must exist"] if entity.check_only else [entity.type]
        case Queue():
            words = ["exclusive"] if entity.exclusive else []
        case Binding():
            words = [f"key {entity.routing_key!r}"]
    if not isinstance(entity, Binding):
        words += [] if entity.durable else ["transient"]
        words += ["auto-delete"] if entity.auto_delete else []
    if isinstance(entity, Exchange) and entity.internal:
        words.append("internal")
    arguments = dict(entity.arguments)
    if isinstance(entity, Queue):
        arguments |= entity.wishes
    words += [f"{name}={format_header(value)}" for name, value in arguments.items()]
    if isinstance(entity, Queue) and entity.no_delivery_limit:
        words.append("no delivery limit")
    return ", ".join(words)


def _version(stated: str | None, consumer: AnyConsumer, needed: Topology) -> Version | None:
    if stated is not None:
        version = parse_version("RabbitMQ", stated)
        if version is None:
            raise ConfigurationError(f"--rabbitmq: {stated!r} is not a version; write it as 4.0")
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
    return [await _compare(transport, each) for each in _entities(topology)]


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


CLOCK_TIMEOUT = 5.0
"""Seconds for the comparison of clocks."""

_NO_CLOCK = datetime(1980, 1, 1, tzinfo=UTC)
"""Earlier times are those of a broker in memory, which counts from 1970."""


async def clock_difference(transport: Transport) -> float | None:
    """Compare the broker's clock with this computer's.

    Returns:
        By how many seconds it is ahead, at least; negative if it is behind, 0 if the clocks may
        show the same; None if that can't be seen.

    Raises:
        BrokerUnavailable: The broker can't be reached.
    """
    # AMQP tells no time, but `x-death` has the second in which a message was dead-lettered. So one
    # is rejected in a queue that no other connection can consume, and that ends with this one.
    name = f"aio-pika-batch.clock.{uuid4().hex}"
    arguments = {DEAD_LETTER_EXCHANGE: "", DEAD_LETTER_ROUTING_KEY: name}
    queue = Queue(name, durable=False, exclusive=True, arguments=arguments)
    subscription = Subscription(
        queue=name, prefetch=1, consumer_tag=name, own=Topology(queues=(queue,)), for_copies=True
    )
    rejected_at, died_at = datetime.now(UTC), None
    try:
        async with (
            asyncio.timeout(CLOCK_TIMEOUT),
            transport.session(subscription) as session,
            transport.publisher() as publisher,
        ):
            await publisher.publish([Publication(b"", routing_key=name)])
            async for [message] in session:
                died_at = death_info(message).died_at
                if died_at is not None:
                    break
                rejected_at = datetime.now(UTC)
                rejection = Settlement(Disposition.REJECT, (message.delivery_tag,))
                await session.settle([rejection])
    except (TopologyError, AccessRefused, TimeoutError):
        return None  # this is not important enough to ask for a permission
    if died_at is None or died_at < _NO_CLOCK:
        return None
    earliest = (died_at - datetime.now(UTC)).total_seconds()
    latest = (died_at - rejected_at).total_seconds() + 1  # the second may have been over
    return max(0.0, earliest) + min(0.0, latest)


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


async def _compare(transport: Transport, entity: Entity) -> Comparison:
    if isinstance(entity, Binding):
        return Comparison(entity, EntityState.UNSEEN)
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
        unfulfilled = await transport.declare(_only(entity)) or {}
    except TopologyError as error:
        return Comparison(entity, EntityState.DIFFERS, str(error))
    found = unfulfilled.get(entity.name, UnfulfilledWishes())
    return Comparison(entity, EntityState.EXISTS, unfulfilled=found)


def _only(entity: Exchange | Queue) -> Topology:
    if isinstance(entity, Queue):
        return Topology(queues=(entity,))
    return Topology(exchanges=(entity,))
