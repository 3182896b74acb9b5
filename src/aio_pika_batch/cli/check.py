"""The command `check`: shows a consumer's settings and compares them with its broker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from aio_pika_batch.cli.app import Exit, Flag
from aio_pika_batch.cli.logging import silence_clients
from aio_pika_batch.cli.printing import console, escaped, print_json, table
from aio_pika_batch.cli.targets import AnyConsumer, TargetOptions, load
from aio_pika_batch.cli.topology import Comparison, EntityState, broker_version, compare, title
from aio_pika_batch.core.config_checks import ConsumerProfile, broker_warnings_for, warnings_for
from aio_pika_batch.core.topology import Binding, build_topology
from aio_pika_batch.masking import mask_url
from aio_pika_batch.settings.derived import consumer_profile, topology_options

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


def _warnings(consumer: AnyConsumer) -> list[CheckFinding]:
    found = warnings_for(topology_options(consumer.settings), _profile(consumer))
    return [CheckFinding("warning", line) for line in found]


def _profile(consumer: AnyConsumer) -> ConsumerProfile:
    return consumer_profile(consumer.settings, consumer.exception_results.values())


async def _findings(consumer: AnyConsumer) -> list[CheckFinding]:
    transport = consumer._transport  # noqa: SLF001  -- same package
    options = topology_options(consumer.settings)
    version = await broker_version(transport)
    compared = await compare(transport, build_topology(options))
    return [
        *(found for found in map(_finding, compared) if found is not None),
        *_warnings(consumer),
        *(
            CheckFinding("warning", line)
            for line in broker_warnings_for(options, _profile(consumer), version)
        ),
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
