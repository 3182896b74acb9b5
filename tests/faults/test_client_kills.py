"""A consumer's process is killed at every point of a settlement, under load, and loses nothing.

Only messages that were unsettled at a kill may be repeated.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aio_pika_batch.core.message import ORIGINAL_ROUTING_KEY
from aio_pika_batch.core.topology_options import AT_LEAST_ONCE
from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from tests.faults.figures import ROOT, Figures
from tests.faults.kill_points import KillPoint
from tests.faults.killed_runs import ProcessRun, read_run
from tests.faults.trial import amqp10_settings
from tests.integration.helpers import (
    App,
    declare_dead_letters,
    holds,
    ids,
    publish,
    skip_without_amqp10,
    take_all,
    until,
)

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

    from tests.support.find import RunningBroker

KINDS = ("good",) * 14 + ("flaky",) * 2 + ("again",) * 2 + ("bad", "doomed")
KILLS = 8
"""How often a consumer is killed in each phase; fewer than a quorum queue's delivery limit."""

MESSAGES_PER_RUN = 300
"""Messages that each of them finds, besides what those before it have left."""

# How often a point may be let pass before it is the last: each life is to have seen it.
LATEST = {
    KillPoint.COLLECTING: 12,
    KillPoint.HANDLING: 200,
    KillPoint.BEFORE_COPY: 8,
    KillPoint.BEFORE_CONFIRM: 8,
    KillPoint.BEFORE_ACK: 8,
    KillPoint.BETWEEN_ACKS: 8,
    KillPoint.DRAINING: 6,
    KillPoint.ANY: 1,
}


@asynccontextmanager
async def consumer(folder: Path, number: int, **options: object) -> AsyncIterator[App]:
    """Run one consumer with its own event log."""
    events, output = folder / f"events-{number}.jsonl", folder / "output.txt"
    arguments = {"event_log": str(events), **options}
    with output.open("ab") as out:
        process = spawn(
            [sys.executable, "-m", "tests.faults.killed_consumer", json.dumps(arguments)],
            cwd=ROOT,
            stdout=out,
        )
    try:
        yield App(process, events, output)
    finally:
        kill_group(process)


@pytest.mark.parametrize(
    "queue_type", ["classic", "quorum", pytest.param("quorum, amqp10", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("point", KillPoint, ids=lambda point: point.name.lower())
async def test_a_killed_client_loses_nothing_and_repeats_unsettled_messages_only(
    broker, channel, name, tmp_path, keep_figures, point, queue_type
) -> None:
    """Eight processes are killed at that point; the ninth empties the queue."""
    rng = random.Random(f"{point.name} {queue_type}")
    queue_type, is_amqp10 = queue_type.split(",")[0], "amqp10" in queue_type
    more = _over_amqp10(broker, point, f"{name}.dlx") if is_amqp10 else {}
    dlx, dlq = await declare_dead_letters(channel, name)
    settings = {
        "url": broker.url,
        "queue_name": name,
        "queue_type": queue_type,
        "batch_size": 20,
        "batch_timeout": 0.05,
        "concurrency": 2,
        "dead_letter_exchange": dlx,
        "requeue_delay": 0,
        **more,
    }
    arguments = {"x-queue-type": queue_type, **more.get("queue_arguments", {})}
    await channel.declare_queue(name, durable=True, arguments=arguments)
    kinds: dict[int, str] = {}
    runs: list[ProcessRun] = []

    for number in range(KILLS):
        new = {len(kinds) + each: rng.choice(KINDS) for each in range(MESSAGES_PER_RUN)}
        kinds |= new
        bodies = [json.dumps({"id": each, "kind": kind}).encode() for each, kind in new.items()]
        await publish(channel, bodies, routing_key=name)
        options = {
            "point": point,
            "countdown": rng.randint(1, LATEST[point]),
            "drain_after": rng.randint(1, 200) if point is KillPoint.DRAINING else None,
            "settle": rng.choice(["batch", "yield"]),
            "num_workers": rng.choice([1, 2]),
            "wire": "amqp10" if is_amqp10 else rng.choice(["fast", "fast", "plain"]),
        }
        async with consumer(tmp_path, number, **(settings | options)) as victim:
            if point is KillPoint.ANY:
                await victim.noted("started")
                await asyncio.sleep(rng.uniform(0, 0.15))
                victim.send(signal.SIGKILL)
            assert -signal.SIGKILL == await victim.ended(), victim.printed[-4000:]
            died = [*victim.of("died"), time.time()][0]
            runs.append(read_run(victim.entries, died))

    async with consumer(tmp_path, KILLS, **settings) as last:
        await last.noted("started")
        # A copy may still be there of what is done or dead already, and is handled once more.
        good = {each for each, kind in kinds.items() if kind not in {"bad", "doomed"}}
        before = set().union(*(each.done for each in runs))
        await until(
            lambda: good <= before.union(last.of("done")), what=lambda: last.printed[-4000:]
        )
        # Over AMQP 1.0 the broker keeps a delayed retry where no count includes it.
        letters: list[AbstractIncomingMessage] = []
        while kinds.keys() - good - ids(letters).keys():
            letters += await take_all(channel, dlq, 1)
        await until(lambda: _is_idle(broker.url, name, last))
        last.send(signal.SIGTERM)
        assert 0 == await last.ended(), last.printed[-4000:]
        runs.append(read_run(last.entries, float("inf")))

    letters += await take_all(channel, dlq)
    dead = ids(letters)
    left = await take_all(channel, name)
    outcomes = sum((each.done for each in runs), dead)
    may_repeat = sum((each.unsettled for each in runs[:-1]), Counter[int]())
    repeated = outcomes - Counter(dict.fromkeys(outcomes, 1))
    lost = kinds.keys() - outcomes.keys()
    keep_figures(
        Figures(
            fault=f"client killed {point}, {queue_type}",
            did=f"SIGKILL for the consumer's process, {KILLS} times, each time with"
            f" {MESSAGES_PER_RUN} new messages.",
            wire="amqp10" if is_amqp10 else "both",
            broker=broker.version,
            messages=len(kinds),
            handled=len(kinds.keys() & outcomes.keys()),
            duplicated=repeated.total(),
            lost=len(lost),
            recovery=None,
        )
    )

    assert not is_amqp10 or not _copied_or_repeated(letters)
    assert [] == left
    assert set() == lost
    assert good == set().union(*(each.done for each in runs))
    assert kinds.keys() - good == dead.keys()
    # Each repetition is owed to a kill that found the message unsettled.
    assert Counter() == repeated - may_repeat


def _over_amqp10(broker: RunningBroker, point: KillPoint, dlx: str) -> dict[str, Any]:
    """Return further settings, or skip the test."""
    if point is KillPoint.BEFORE_CONFIRM:
        pytest.skip("over AMQP 1.0 nothing is confirmed: there are no copies")
    skip_without_amqp10(broker)
    found = amqp10_settings(broker.version)
    found["queue_arguments"] |= {"x-dead-letter-exchange": dlx, **AT_LEAST_ONCE}
    return found


def _copied_or_repeated(letters: Sequence[AbstractIncomingMessage]) -> list[bytes]:
    """Return which dead letters are copies, or came twice."""
    copied = [each.body for each in letters if ORIGINAL_ROUTING_KEY in each.headers]
    counts = Counter(each.body for each in letters)
    return copied + [body for body, count in counts.items() if count > 1]


async def _is_idle(url: str, queue: str, app: App) -> bool:
    """Return whether the queue is empty, and all delivered messages are settled."""
    await holds(url, queue, 0)
    delivered = sum(len(tags) for _, tags in app.of("delivered"))
    settled = sum(len(tags) for _, _, tags in app.of("settled"))
    await asyncio.sleep(0.2)
    return delivered == settled and delivered == sum(len(tags) for _, tags in app.of("delivered"))
