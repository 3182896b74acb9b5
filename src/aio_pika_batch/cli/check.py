"""Is a consumer configured as it was meant to be, and does its broker agree?"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.cli.inspection import Standing, State, broker_version, inspect
from aio_pika_batch.cli.printing import console, harmless, hush, print_json, table
from aio_pika_batch.cli.targets import AnyConsumer, Loading, load
from aio_pika_batch.cli.topology import title
from aio_pika_batch.core.config_checks import ConsumerProfile, broker_warnings_for, warnings_for
from aio_pika_batch.core.topology import Binding, build_topology
from aio_pika_batch.masking import mask_url
from aio_pika_batch.settings.derived import consumer_profile, topology_options

Level = Literal["error", "warning", "info"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know, with what to do about it."""

    level: Level
    text: str


def check(
    target: str,
    /,
    *,
    format: Literal["table", "json"] = "table",  # noqa: A002  -- its name on the command line
    offline: Annotated[bool, Parameter(negative="")] = False,
    strict: Annotated[bool, Parameter(negative="")] = False,
    loading: Loading | None = None,
) -> int:
    """Show a consumer's configuration, and hold it to the broker. Nothing is declared.

    Args:
        target: The consumer, as module:attribute.
        format: For readers, or for programs.
        offline: Ask no broker.
        strict: Warnings are errors, too.
        loading: How the consumer is found.
    """
    hush()
    loading = loading or Loading()
    consumer = load(target, loading)
    rows = _settings(consumer, url_given=loading.url is not None)
    findings = _advice(consumer) if offline else asyncio.run(_findings(consumer))
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


def _advice(consumer: AnyConsumer) -> list[Finding]:
    found = warnings_for(topology_options(consumer.settings), _profile(consumer))
    return [Finding("warning", line) for line in found]


def _profile(consumer: AnyConsumer) -> ConsumerProfile:
    return consumer_profile(consumer.settings, consumer.exception_results.values())


async def _findings(consumer: AnyConsumer) -> list[Finding]:
    transport = consumer._transport  # noqa: SLF001  -- our own
    options = topology_options(consumer.settings)
    version = await broker_version(transport)
    standings = await inspect(transport, build_topology(options))
    return [
        *(found for found in map(_finding, standings) if found is not None),
        *_advice(consumer),
        *(
            Finding("warning", line)
            for line in broker_warnings_for(options, _profile(consumer), version)
        ),
    ]


def _finding(standing: Standing) -> Finding | None:
    entity = standing.entity
    what = " ".join(title(entity))
    match standing.state:
        case State.THERE | State.UNSEEN:
            return None
        case State.MISSING if not isinstance(entity, Binding) and entity.check_only:
            return Finding("error", standing.words)
        case State.MISSING:
            return Finding(
                "info", f"{what} is not there yet: the consumer declares it at its start"
            )
        case State.DIFFERS | State.REFUSED:
            return Finding("error", standing.words)


def _print(rows: list[tuple[str, object, str]], findings: list[Finding]) -> None:
    out = console()
    made = table("setting", "value", "from")
    for name, value, source in rows:
        made.add_row(name, harmless("" if value is None else str(value)), source)
    out.print(made)
    out.print()
    for each in findings:
        out.print(f"[{_STYLES[each.level]}]{each.level}[/]:", harmless(each.text))
    if not findings:
        out.print("Nothing found.")
