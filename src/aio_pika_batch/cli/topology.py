"""What does a consumer need on its broker, and how does it get there?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from cyclopts import Parameter

from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.cli.inspection import Entity, Standing, State, broker_version, inspect
from aio_pika_batch.cli.printing import console, harmless, hush, print_json, table
from aio_pika_batch.cli.targets import AnyConsumer, Loading, load
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
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.settings.derived import topology_options

BAD = frozenset({State.DIFFERS, State.REFUSED})


def topology(
    target: str,
    /,
    *,
    apply: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    format: Literal["table", "json", "definitions"] = "table",  # noqa: A002  -- its name on the command line
    rabbitmq: str | None = None,
    vhost: str | None = None,
    loading: Loading | None = None,
) -> int:
    """Show what a consumer needs on its broker: queues, exchanges, bindings.

    Args:
        target: The consumer, as module:attribute.
        apply: Declare it, also where the consumer itself would not (declare=False).
        dry_run: Look for it: what exists, what is missing, what differs. Nothing is declared.
        format: For readers, for programs, or as definitions that RabbitMQ imports.
        rabbitmq: Version of the RabbitMQ that shall import definitions; none: the broker is asked.
        vhost: Virtual host of the definitions; none: that of the consumer's URL.
        loading: How the consumer is found.
    """
    hush()
    consumer = load(target, loading or Loading())
    needed = build_topology(replace(topology_options(consumer.settings), declare=True))
    if apply and dry_run:
        raise ConfigurationError("--apply and --dry-run contradict each other: use one of them")
    if format == "definitions":
        if apply or dry_run:
            raise ConfigurationError("--format definitions is for RabbitMQ to import: use it alone")
        where = vhost if vhost is not None else _vhost(consumer.settings.url)
        version = _version(rabbitmq, consumer, needed)
        print(json.dumps(to_definitions(needed, where, version), indent=2))
        return Exit.OK
    return asyncio.run(_shown(consumer, needed, apply=apply, dry_run=dry_run, format=format))


async def _shown(
    consumer: AnyConsumer,
    needed: Topology,
    *,
    apply: bool,
    dry_run: bool,
    format: str,  # noqa: A002  -- as above
) -> Exit:
    transport = consumer._transport  # noqa: SLF001  -- our own
    if apply:
        await transport.declare(needed)
    standings: list[Standing] = []
    if apply or dry_run:
        standings = await inspect(transport, needed)
    if format == "json":
        print_json(
            [{**_row(each.entity), **_state(each)} for each in standings]
            or [_row(entity) for entity in entities(needed)]
        )
    else:
        _print(needed, standings)
        if apply:
            console().print("Declared.")
    return Exit.FAILED if any(each.state in BAD for each in standings) else Exit.OK


def entities(topology: Topology) -> Iterator[Entity]:
    """All of it but the default exchange, which is everywhere."""
    yield from (exchange for exchange in topology.exchanges if exchange.name)
    yield from topology.queues
    yield from (binding for binding in topology.bindings if binding.exchange)


def title(entity: Entity) -> tuple[str, str]:
    """What it is, and its name."""
    match entity:
        case Exchange():
            return "exchange", entity.name
        case Queue():
            return "queue", entity.name
        case Binding():
            return "binding", f"{entity.exchange} → {entity.queue}"


def _print(needed: Topology, standings: list[Standing]) -> None:
    made = table("what", "name", "how", *(["state"] if standings else []))
    for entity in entities(needed):
        made.add_row(*title(entity), harmless(_how(entity)))
    if standings:
        made = table("what", "name", "how", "state")
        for each in standings:
            made.add_row(*title(each.entity), harmless(_how(each.entity)), each.state.value)
    console().print(made)
    for each in standings:
        if each.state in BAD:
            console().print(harmless(each.words))


def _how(entity: Entity) -> str:
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
    words += [f"{name}={format_header(value)}" for name, value in entity.arguments.items()]
    if isinstance(entity, Queue) and entity.no_delivery_limit:
        words.append("no delivery limit")
    return ", ".join(words)


def _row(entity: Entity) -> dict[str, object]:
    return {"what": title(entity)[0], **asdict(entity)}


def _state(standing: Standing) -> dict[str, object]:
    return {"state": standing.state.value, "words": standing.words}


def _version(stated: str | None, consumer: AnyConsumer, needed: Topology) -> Version | None:
    if stated is not None:
        version = parse_version("RabbitMQ", stated)
        if version is None:
            raise ConfigurationError(f"--rabbitmq: {stated!r} is no version, as 4.0 is one")
        return version
    if not depends_on_version(needed):
        return None
    return asyncio.run(broker_version(consumer._transport))  # noqa: SLF001  -- our own


def _vhost(url: str) -> str:
    """The virtual host that a URL names; `/`, the default one, if it names none."""
    return unquote(urlsplit(url.rsplit(",", maxsplit=1)[-1]).path[1:]) or "/"
