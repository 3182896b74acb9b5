"""The commands `check` and `topology`: show what a consumer needs, compare it with its broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Literal, TypeAlias
from urllib.parse import unquote, urlsplit

from aio_pika_batch.cli.app import Exit, Flag
from aio_pika_batch.cli.logging import silence_clients
from aio_pika_batch.cli.printing import console, escaped, print_json, table
from aio_pika_batch.cli.targets import AnyConsumer, TargetOptions, load
from aio_pika_batch.core.config_checks import broker_warnings_for, warnings_for
from aio_pika_batch.core.dead_letter import format_header
from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    Queue,
    Topology,
    Version,
    build_topology,
    depends_on_version,
    parse_version,
    to_definitions,
)
from aio_pika_batch.errors import ConfigurationError, TopologyError
from aio_pika_batch.masking import mask_url
from aio_pika_batch.settings.derived import consumer_profile, topology_options
from aio_pika_batch.transport import Transport, VersionedTransport

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
    findings = _warnings(consumer) if offline else asyncio.run(_findings(consumer))
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
    values["url"] = mask_url(settings.url)
    rows = [
        (name, value, "command line" if name == "url" and url_given else sources[name])
        for name, value in values.items()
    ]
    return [
        *rows,
        ("(effective prefetch)", settings.effective_prefetch, "derived"),
        ("(effective stuck_after)", settings.effective_stuck_after, "derived"),
    ]


def _warnings(consumer: AnyConsumer) -> list[CheckFinding]:
    profile = consumer_profile(consumer.settings, consumer.exception_results.values())
    found = warnings_for(topology_options(consumer.settings), profile)
    return [CheckFinding("warning", line) for line in found]


async def _findings(consumer: AnyConsumer) -> list[CheckFinding]:
    transport = consumer._transport  # noqa: SLF001  -- same package
    options = topology_options(consumer.settings)
    profile = consumer_profile(consumer.settings, consumer.exception_results.values())
    version = await broker_version(transport)
    compared = await compare(transport, build_topology(options))
    return [
        *(found for found in map(_finding, compared) if found is not None),
        *_warnings(consumer),
        *(CheckFinding("warning", line) for line in broker_warnings_for(options, profile, version)),
    ]


def _finding(comparison: Comparison) -> CheckFinding | None:
    entity = comparison.entity
    match comparison.state:
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
    made = table("setting", "value", "from")
    for name, value, source in rows:
        made.add_row(name, escaped("" if value is None else str(value)), source)
    out.print(made)
    out.print()
    for each in findings:
        out.print(f"[{_STYLES[each.level]}]{each.level}[/]:", escaped(each.text))
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
    """

    entity: Entity
    state: EntityState
    words: str = ""


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
    needed = build_topology(replace(topology_options(consumer.settings), declare=True))
    if apply and dry_run:
        raise ConfigurationError("--apply and --dry-run contradict each other: use one of them")
    if format == "definitions":
        if apply or dry_run:
            raise ConfigurationError(
                "--format definitions: cannot be combined with --apply or --dry-run"
            )
        where = vhost if vhost is not None else _vhost(consumer.settings.url)
        version = _version(rabbitmq, consumer, needed)
        print(json.dumps(to_definitions(needed, where, version), indent=2))
        return Exit.OK
    return asyncio.run(_show(consumer, needed, apply=apply, dry_run=dry_run, format=format))


async def _show(
    consumer: AnyConsumer,
    needed: Topology,
    *,
    apply: bool,
    dry_run: bool,
    format: str,  # noqa: A002  -- as above
) -> Exit:
    transport = consumer._transport  # noqa: SLF001  -- same package
    if apply:
        await transport.declare(needed)
    compared: list[Comparison] = []
    if apply or dry_run:
        compared = await compare(transport, needed)
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
            words = ["exclusive"] if entity.exclusive else []
        case Binding():
            words = [f"key {entity.routing_key!r}"]
    if not isinstance(entity, Binding):
        words += [] if entity.durable else ["transient"]
        words += ["auto-delete"] if entity.auto_delete else []
    words += [f"{name}={format_header(value)}" for name, value in entity.arguments.items()]
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


def _vhost(url: str) -> str:
    """Return the virtual host of a URL; `/`, the default one, if it has none."""
    # Several URLs name nodes of one cluster, so any of them has the virtual host.
    return unquote(urlsplit(url.rsplit(",", maxsplit=1)[-1]).path[1:]) or "/"


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
        await transport.declare(_only(entity))
    except TopologyError as error:
        return Comparison(entity, EntityState.DIFFERS, str(error))
    return Comparison(entity, EntityState.EXISTS)


def _only(entity: Exchange | Queue) -> Topology:
    if isinstance(entity, Queue):
        return Topology(queues=(entity,))
    return Topology(exchanges=(entity,))
