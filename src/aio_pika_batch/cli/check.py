"""The command `check`: shows a consumer's settings and compares them with its broker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from aio_pika_batch.cli.app import Exit, Flag
from aio_pika_batch.cli.logging import silence_clients
from aio_pika_batch.cli.printing import console, escaped, print_json, table
from aio_pika_batch.cli.targets import AnyConsumer, TargetOptions, load
from aio_pika_batch.cli.topology import (
    Comparison,
    EntityState,
    broker_version,
    compare,
    look_up_arguments,
    look_up_type,
    title,
)
from aio_pika_batch.core.config_checks import (
    ConsumerProfile,
    broker_warnings_for,
    dead_letter_queue_warnings,
    existing_queue_warnings,
    warnings_for,
)
from aio_pika_batch.core.refusals import STREAM_ADVICE
from aio_pika_batch.core.topology import Binding, Queue, Topology, Version, build_topology
from aio_pika_batch.core.topology_options import (
    QUEUE_TYPE,
    TopologyOptions,
    policy_command,
    refuse_loops,
)
from aio_pika_batch.errors import ConfigurationError, TopologyError
from aio_pika_batch.masking import mask_url
from aio_pika_batch.settings.derived import consumer_profile, topology_options, virtual_host
from aio_pika_batch.transport import Transport

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
        _print(rows, findings)
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
    found = warnings_for(topology_options(consumer.settings), _profile(consumer))
    return [CheckFinding("warning", line) for line in found]


def _profile(consumer: AnyConsumer) -> ConsumerProfile:
    return consumer_profile(consumer.settings, consumer.exception_results.values())


async def _findings(consumer: AnyConsumer) -> list[CheckFinding]:
    transport = consumer._transport  # noqa: SLF001  -- same package
    options = topology_options(consumer.settings)
    version = await broker_version(transport)
    try:
        needed = _topology(options, await look_up_type(transport, options))
    except (ConfigurationError, TopologyError) as error:
        return [CheckFinding("error", str(error)), *_warnings(consumer)]
    compared = await compare(transport, needed)
    vhost = virtual_host(consumer.settings.url)
    return [
        *(found for each in compared if (found := _finding(each, vhost)) is not None),
        *await _existing_queues(transport, options, compared, version),
        *await _permissions(transport, needed),
        *_warnings(consumer),
        *(
            CheckFinding("warning", line)
            for line in broker_warnings_for(options, _profile(consumer), version)
        ),
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
        case EntityState.EXISTS if comparison.lacking and isinstance(entity, Queue):
            names = ", ".join(comparison.lacking)
            command = policy_command(entity.name, comparison.lacking, vhost)
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


def _print(rows: list[tuple[str, object, str]], findings: list[CheckFinding]) -> None:
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
