"""The commands `dlq list`, `show`, `replay` and `purge`, for dead letters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import App, Parameter

from aio_pika_batch.cli.app import EXIT_CODES, Exit, Flag, Strings, print_error, run_interruptible
from aio_pika_batch.cli.printing import (
    ProgressBar,
    console,
    describe_age,
    escaped,
    letter_as_json,
    parse_duration,
    print_json,
    print_letter,
    print_table,
    summary,
)
from aio_pika_batch.cli.targets import DeadLetterQueue, QueueOptions, TargetOptions, find_queue
from aio_pika_batch.dead_letters import EVERY, Filter, Looked, Report, look, purge, replay
from aio_pika_batch.errors import ConfigurationError, TransportError

_READ_CODES = EXIT_CODES.format(failed="1 not all could be read")
_CHANGE_CODES = (
    "Exit codes: 0 success; 1 some stay that match, or it ended early; 2 wrong usage or"
    " configuration, or nothing done for want of --yes; 3 cannot connect; 130 interrupted."
)

app = App(name="dlq")  # cli.app has its help


Duration: TypeAlias = Annotated[
    timedelta, Parameter(converter=lambda _, tokens: parse_duration(tokens[0].value))
]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """Options that select dead letters: those that match all of them."""

    reason: Strings = ()
    """Only with this reason: rejected, exhausted, handler-error, undecodable, expired, …"""
    older_than: Duration | None = None
    """Only if dead-lettered longer ago than this: 90s, 15m, 2h, 3d, 1w."""
    newer_than: Duration | None = None
    """Only if dead-lettered more recently than this."""
    header: Strings = ()
    """Only with this header, as name=value."""
    limit: int | None = None
    """At most this many."""

    @property
    def filter(self) -> Filter:
        """The filter. Raises ConfigurationError for an invalid option."""
        headers = {}
        for each in self.header:
            name, equals, value = each.partition("=")
            if not equals:
                raise ConfigurationError(f"--header: write name=value, not {each!r}")
            headers[name] = value
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError("--limit: must be at least 1")
        return Filter(
            reasons=frozenset(self.reason),
            older_than=self.older_than,
            newer_than=self.newer_than,
            headers=headers,
        )


@app.command(name="list", help_epilogue=_READ_CODES)
def list_(
    target: str | None = None,
    /,
    *more: str,
    look_at: int = 100,
    format: Literal["table", "json"] = "table",  # noqa: A002  -- its name on the command line
    place: QueueOptions | None = None,
    loading: TargetOptions | None = None,
) -> int:
    """Count dead letters and the reasons why messages were dead-lettered.

    Reads the reasons from the oldest dead letters. A quorum queue counts this as a delivery.

    Example: aio-pika-batch dlq list shop:Importer

    Args:
        target: Consumer as module:attribute; or name a queue with --queue.
        more: More consumers.
        look_at: Read at most this many dead letters of each queue.
        format: Output format.
        place: The queue.
        loading: How consumers are found.
    """
    found = [find_queue(each, place, loading) for each in [target, *more]]
    _check_positive(look_at, "--look-at")
    looked = _look(found, look_at, {"keep": False}, lambda so_far: so_far.queue)
    if format == "json":
        print_json([summary(each) for each in looked])
    else:
        rows = [(summary(each), each) for each in looked]
        print_table(
            ["queue", "dead letters", "looked at", "reasons", "oldest", "newest"],
            (
                (
                    each.queue,
                    _number(each.ready),
                    row["looked_at"],
                    ", ".join(f"{count} {reason}" for reason, count in row["reasons"].items()),
                    describe_age(row["oldest"]),
                    describe_age(row["newest"]),
                )
                for row, each in rows
            ),
        )
    return _report_early_end(looked)


@app.command(help_epilogue=_READ_CODES)
def show(
    target: str | None = None,
    /,
    *,
    look_at: int | None = None,
    max_bytes: int = 2000,
    format: Literal["text", "json"] = "text",  # noqa: A002  -- its name on the command line
    where: FilterOptions | None = None,
    place: QueueOptions | None = None,
    loading: TargetOptions | None = None,
) -> int:
    """Show the headers and bodies of dead letters, and leave them in the queue.

    A quorum queue counts this as a delivery.

    Example: aio-pika-batch dlq show shop:Importer --reason exhausted --limit 1

    Args:
        target: Consumer as module:attribute; or name a queue with --queue.
        look_at: Read at most this many dead letters; 100, or all of them with a filter.
        max_bytes: Show at most this many bytes of each body.
        format: Output format; in json, bodies that aren't text are hex.
        where: Which dead letters; 10, unless a limit is given.
        place: The queue.
        loading: How the consumer is found.
    """
    found = find_queue(target, place, loading)
    where = where or FilterOptions()
    matches = where.filter
    most = 100 if look_at is None and matches == EVERY else look_at
    _check_positive(most, "--look-at")
    _check_positive(max_bytes, "--max-bytes")
    how = {"where": matches, "limit": where.limit or 10}
    [looked] = _look([found], most, how, lambda so_far: f"{len(so_far.letters)} found")
    if format == "json":
        print_json([letter_as_json(letter, max_bytes) for letter in looked.letters])
    else:
        for letter in looked.letters:
            print_letter(console(), letter, max_bytes)
        console().print(
            escaped(
                f"{len(looked.letters)} shown, {looked.seen} looked at,"
                f" {_number(looked.ready)} in {looked.queue}"
            )
        )
    _list_reasons(where, looked.reasons)
    return _report_early_end([looked])


def _look(
    queues: list[DeadLetterQueue],
    most: int | None,
    how: dict[str, Any],
    describe: Callable[[Looked], str],
) -> list[Looked]:
    """Look at queues with more arguments for `look`, and show the progress."""

    def on_progress(so_far: Looked) -> None:
        counts = [each for each in (most, so_far.ready) if each is not None]
        bar.update(describe(so_far), so_far.seen, min(counts, default=None))

    async def work() -> list[Looked]:
        how.update(most=most, stop=stop, on_progress=on_progress)
        return [await look(each.transport, each.queue, **how, **each.how) for each in queues]

    stop = asyncio.Event()
    # Not on standard output, which other programs may read.
    with ProgressBar(console(is_error=True)) as bar:
        return run_interruptible(work(), stop.set)


def _list_reasons(where: FilterOptions, found: Counter[str]) -> None:
    """Print the reasons that exist if none of those that were asked for does."""
    if where.reason and found and not found.keys() & set(where.reason):
        there = ", ".join(f"{reason} ({count})" for reason, count in found.most_common())
        print_error(f"no dead letter has the reason {' or '.join(where.reason)}; found: {there}")


def _number(count: int | None) -> str:
    return "?" if count is None else str(count)


def _report_early_end(looked: list[Looked]) -> Exit:
    for each in looked:
        if each.ended is not None:
            print_error(f"{each.queue}: {each.ended}")
    return Exit.FAILED if any(each.ended is not None for each in looked) else Exit.OK


@app.command(name="replay", help_epilogue=_CHANGE_CODES)
def replay_(
    target: str | None = None,
    /,
    *,
    to_queue: Flag = False,
    dry_run: Flag = False,
    scan: int | None = None,
    format: Literal["text", "json"] = "text",  # noqa: A002  -- its name on the command line
    where: FilterOptions | None = None,
    place: QueueOptions | None = None,
    loading: TargetOptions | None = None,
) -> int:
    """Publish dead letters to their original exchange again, with the retry count reset.

    Nothing is lost: a dead letter is removed only after the broker has confirmed its copy. Ctrl-C
    finishes the copies in progress. Dead letters that don't match stay in the queue.

    Example: aio-pika-batch dlq replay shop:Importer --reason exhausted --newer-than 2h --dry-run

    Args:
        target: Consumer as module:attribute; or name a queue with --queue.
        to_queue: Publish only to the queue that the message was dead-lettered from, not to every
            queue bound to its exchange.
        dry_run: Only count the dead letters that match. A quorum queue counts this as a delivery.
        scan: Hold at most this many dead letters that don't match; by default any number.
        format: Output format.
        where: Which dead letters.
        place: The queue.
        loading: How the consumer is found.
    """
    return _change(
        partial(replay, to_queue=to_queue, dry_run=dry_run),
        "would be replayed" if dry_run else "replayed",
        find_queue(target, place, loading),
        where or FilterOptions(),
        scan=scan,
        format=format,
    )


@app.command(name="purge", help_epilogue=_CHANGE_CODES)
def purge_(
    target: str | None = None,
    /,
    *,
    yes: Flag = False,
    scan: int | None = None,
    format: Literal["text", "json"] = "text",  # noqa: A002  -- its name on the command line
    where: FilterOptions | None = None,
    place: QueueOptions | None = None,
    loading: TargetOptions | None = None,
) -> int:
    """Delete dead letters permanently. Without --yes, only count them.

    Example: aio-pika-batch dlq purge shop:Importer --older-than 30d --yes

    Args:
        target: Consumer as module:attribute; or name a queue with --queue.
        yes: Delete them.
        scan: Hold at most this many dead letters that don't match; by default any number.
        format: Output format.
        where: Which dead letters.
        place: The queue.
        loading: How the consumer is found.
    """
    code = _change(
        partial(purge, dry_run=not yes),
        "deleted" if yes else "would be deleted",
        find_queue(target, place, loading),
        where or FilterOptions(),
        scan=scan,
        format=format,
    )
    # Not a success: a script that forgets --yes must notice.
    if not yes:
        print_error("nothing was deleted; add --yes to delete them")
        return code or Exit.USAGE
    return code


def _check_positive(value: int | None, option: str) -> None:
    """Check a number of messages or bytes. Raises ConfigurationError."""
    if value is not None and value < 1:
        raise ConfigurationError(f"{option}: must be at least 1, not {value}")


def _change(
    change: Callable[..., Coroutine[Any, Any, Report]],
    verb: str,
    found: DeadLetterQueue,
    where: FilterOptions,
    *,
    scan: int | None,
    format: str,  # noqa: A002  -- as above
) -> int:
    """Run a replay or purge, show its progress, print its report, return the exit code.

    Args:
        verb: What happens to dead letters, as "replayed".
    """
    matches = where.filter
    _check_positive(scan, "--scan")
    # With JSON, the progress must not get into it.
    out = console(is_error=format == "json")
    stop = asyncio.Event()
    last: list[Report] = []
    with ProgressBar(out) as bar:

        def on_progress(report: Report) -> None:
            last[:] = [report]
            bar.update(f"{report.done} {verb}", report.seen, report.ready)

        work = change(
            found.transport,
            found.queue,
            where=matches,
            limit=where.limit,
            scan=scan,
            stop=stop,
            on_progress=on_progress,
            **found.how,
        )
        # The error itself doesn't say how many were replayed before it.
        try:
            report = run_interruptible(work, stop.set)
        except TransportError:
            for each in last:
                print_error(f"{each.done} {verb} before this error:")
            raise
    total = "" if report.ready is None else f" of {report.ready}"
    failed = sum(report.failed.values())
    if format == "json":
        print_json({each.name: getattr(report, each.name) for each in fields(report)})
    else:
        # If it ended early, the number of the others is unknown.
        least = "" if report.ended is None or report.seen == report.ready else "at least "
        console().print(
            f"{least}{report.done}{total} dead letters {verb}; {report.kept} did not match,"
            f" {failed} failed"
        )
    _list_reasons(where, report.reasons)
    for reason, count in report.failed.items():
        print_error(f"{count} stay in {report.queue}: {reason}")
    if report.ended is not None:
        print_error(f"{report.queue}: ended early: {report.ended}")
    if report.ended == "interrupted":
        return Exit.INTERRUPTED
    return Exit.FAILED if failed or report.ended is not None else Exit.OK
