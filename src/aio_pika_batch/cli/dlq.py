"""How are dead letters looked at, sent back and deleted from a terminal?"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Literal

from cyclopts import App, Parameter

from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.cli.places import Meant, Place, at_most, find, interruptible
from aio_pika_batch.cli.printing import complain, console, harmless, plain, print_json, table
from aio_pika_batch.cli.progress import with_progress
from aio_pika_batch.cli.showing import ago, as_data, show_letter, summary
from aio_pika_batch.cli.targets import Loading
from aio_pika_batch.dead_letters import SCAN, Looked, look, purge, replay

app = App(name="dlq")  # its help stands where it is registered


# --- list ------------------------------------------------------------------------


@app.command(name="list")
def list_(
    target: str | None = None,
    /,
    *more: str,
    look_at: int = 100,
    format: Literal["table", "json"] = "table",  # noqa: A002  -- its name on the command line
    place: Place | None = None,
    loading: Loading | None = None,
) -> int:
    """Count the dead letters of consumers, and say why they died.

    Reasons are read from the oldest letters; looking counts as a delivery where a quorum queue
    counts them.

    Example: aio-pika-batch dlq list app:Orders

    Args:
        target: A consumer, as module:attribute; or name a queue by --queue.
        more: Further consumers.
        look_at: Look at so many letters of each queue, at most.
        format: For readers, or for programs.
        place: Which queue.
        loading: How consumers are found.
    """
    targets = [target, *more]
    found = [find(each, place, loading) for each in targets]
    most = at_most(look_at, "--look-at")

    async def work(stop: asyncio.Event) -> list[Looked]:
        return [
            await look(each.transport, each.queue, most=most, stop=stop, **each.how)
            for each in found
        ]

    seen = interruptible(work)
    if format == "json":
        print_json([summary(each) for each in seen])
    else:
        made = table("queue", "letters", "looked at", "reasons", "oldest", "newest")
        for each in seen:
            row = summary(each)
            reasons = ", ".join(f"{count} {why}" for why, count in row["reasons"].items())
            oldest, newest = ago(row["oldest"]), ago(row["newest"])
            letters = "?" if each.ready is None else str(each.ready)
            made.add_row(
                each.queue, letters, str(row["looked_at"]), harmless(reasons), oldest, newest
            )
        console().print(made)
    return _ended(seen)


def _ended(seen: list[Looked]) -> Exit:
    for each in seen:
        if each.ended is not None:
            complain(f"{each.queue}: {each.ended}")
    return Exit.FAILED if any(each.ended is not None for each in seen) else Exit.OK


# --- show ------------------------------------------------------------------------


@app.command
def show(
    target: str | None = None,
    /,
    *,
    look_at: int = 100,
    max_bytes: int = 2000,
    format: Literal["text", "json"] = "text",  # noqa: A002  -- its name on the command line
    meant: Meant | None = None,
    place: Place | None = None,
    loading: Loading | None = None,
) -> int:
    """Show dead letters, headers and body, and leave them where they are.

    Looking counts as a delivery where a quorum queue counts them.

    Example: aio-pika-batch dlq show app:Orders --reason exhausted --limit 1

    Args:
        target: The consumer, as module:attribute; or name a queue by --queue.
        look_at: Look at so many letters, at most.
        max_bytes: Show so many bytes of each body, at most.
        format: For readers, or for programs (bodies as hex).
        meant: Which letters; 10, unless a limit is given.
        place: Which queue.
        loading: How the consumer is found.
    """
    found = find(target, place, loading)
    meant = meant or Meant()
    where = meant.filter
    most = at_most(look_at, "--look-at")
    at_most(max_bytes, "--max-bytes")
    looked = interruptible(
        lambda stop: look(found.transport, found.queue, most=most, stop=stop, **found.how)
    )
    now = datetime.now(UTC)
    letters = [
        (number, letter)
        for number, letter in enumerate(looked.letters, 1)
        if where.matches(letter.message, letter.death, now)
    ][: meant.limit or 10]
    if format == "json":
        print_json([as_data(number, letter, max_bytes) for number, letter in letters])
    else:
        for number, letter in letters:
            show_letter(console(), number, letter, max_bytes)
        console().print(
            f"{len(letters)} shown, {len(looked.letters)} looked at,"
            f" {'?' if looked.ready is None else looked.ready} in {plain(looked.queue)}",
            markup=False,
        )
    return _ended([looked])


# --- replay and purge ------------------------------------------------------------


@app.command(name="replay")
def replay_(
    target: str | None = None,
    /,
    *,
    to_queue: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    scan: int = SCAN,
    meant: Meant | None = None,
    place: Place | None = None,
    loading: Loading | None = None,
) -> int:
    """Send dead letters back to their original exchange and routing key, with no retries counted.

    Each copy is confirmed by the broker before its letter is taken away, so that nothing is lost,
    however this ends; Ctrl-C ends it cleanly. Letters that are not meant stay.

    Example: aio-pika-batch dlq replay app:Orders --reason exhausted --newer-than 2h --dry-run

    Args:
        target: The consumer, as module:attribute; or name a queue by --queue.
        to_queue: Only to the queue in which each died, not to all that its exchange is bound to.
        dry_run: Only tell how many it would be; looking counts as a delivery.
        scan: Hold so many letters that stay, at most, while looking for those that are meant.
        meant: Which letters.
        place: Which queue.
        loading: How the consumer is found.
    """
    found, meant = find(target, place, loading), meant or Meant()
    where, most = meant.filter, at_most(scan, "--scan")
    verb = "would be replayed" if dry_run else "replayed"
    return with_progress(
        verb,
        lambda stop, told: replay(
            found.transport,
            found.queue,
            where=where,
            limit=meant.limit,
            scan=most,
            to_queue=to_queue,
            dry_run=dry_run,
            stop=stop,
            on_progress=told,
            **found.how,
        ),
    )


@app.command(name="purge")
def purge_(
    target: str | None = None,
    /,
    *,
    yes: Annotated[bool, Parameter(negative="")] = False,
    scan: int = SCAN,
    meant: Meant | None = None,
    place: Place | None = None,
    loading: Loading | None = None,
) -> int:
    """Delete dead letters, for good; without --yes only tell how many it would be.

    Example: aio-pika-batch dlq purge app:Orders --older-than 30d --yes

    Args:
        target: The consumer, as module:attribute; or name a queue by --queue.
        yes: Do it.
        scan: Hold so many letters that stay, at most, while looking for those that are meant.
        meant: Which letters.
        place: Which queue.
        loading: How the consumer is found.
    """
    found, meant = find(target, place, loading), meant or Meant()
    where, most = meant.filter, at_most(scan, "--scan")
    code = with_progress(
        "deleted" if yes else "would be deleted",
        lambda stop, told: purge(
            found.transport,
            found.queue,
            where=where,
            limit=meant.limit,
            scan=most,
            dry_run=not yes,
            stop=stop,
            on_progress=told,
            **found.how,
        ),
    )
    if not yes:
        complain("nothing was deleted: add --yes to do it")
        return code or Exit.USAGE
    return code
