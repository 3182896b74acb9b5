"""Is anything lost when a consumer's process is killed, in whatever it was doing?

SIGKILL, in every phase of a settlement, again and again, under load. What a kill may repeat is told
by what was in hand at it, and nothing else may be repeated.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from tests.faults.figures import ROOT, Figures
from tests.faults.lives import Life, life
from tests.faults.moments import Moment
from tests.integration.helpers import App, dead_letter_office, holds, publish, take_all, until

KINDS = ("good",) * 14 + ("flaky",) * 2 + ("again",) * 2 + ("bad", "doomed")
LIVES = 8
"""How often a consumer is killed in each phase; fewer than a quorum queue's delivery limit."""

PER_LIFE = 300
"""Messages that each of them finds, besides what those before it have left."""

# How often a moment may be let pass before it is the last: each life is to have seen it.
LATEST = {
    Moment.COLLECTING: 12,
    Moment.HANDLING: 200,
    Moment.BEFORE_COPY: 8,
    Moment.BEFORE_CONFIRM: 8,
    Moment.BEFORE_ACK: 8,
    Moment.BETWEEN_ACKS: 8,
    Moment.DRAINING: 6,
    Moment.ANY: 1,
}


@asynccontextmanager
async def consumer(folder: Path, number: int, **options: object) -> AsyncIterator[App]:
    """Run one consumer, with a diary of its own."""
    diary, output = folder / f"diary-{number}.jsonl", folder / "output.txt"
    arguments = {"diary": str(diary), **options}
    with output.open("ab") as out:
        process = spawn(
            [sys.executable, "-m", "tests.faults.mortal", json.dumps(arguments)],
            cwd=ROOT,
            stdout=out,
        )
    try:
        yield App(process, diary, output)
    finally:
        kill_group(process)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("moment", Moment, ids=lambda moment: moment.name.lower())
async def test_a_killed_client_loses_nothing_and_repeats_what_it_had_in_hand(
    broker, channel, name, tmp_path, keep_figures, moment, queue_type
) -> None:
    """Eight lives end in that moment; the ninth empties the queue."""
    rng = random.Random(f"{moment.name} {queue_type}")
    dlx, dlq = await dead_letter_office(channel, name)
    settings = {
        "url": broker.url,
        "queue_name": name,
        "queue_type": queue_type,
        "batch_size": 20,
        "batch_timeout": 0.05,
        "concurrency": 2,
        "dead_letter_exchange": dlx,
    }
    await channel.declare_queue(name, durable=True, arguments={"x-queue-type": queue_type})
    kinds: dict[int, str] = {}
    lives: list[Life] = []

    for number in range(LIVES):
        new = {len(kinds) + each: rng.choice(KINDS) for each in range(PER_LIFE)}
        kinds |= new
        bodies = [json.dumps({"id": each, "kind": kind}).encode() for each, kind in new.items()]
        await publish(channel, bodies, routing_key=name)
        options = {
            "moment": moment,
            "countdown": rng.randint(1, LATEST[moment]),
            "drain_after": rng.randint(1, 200) if moment is Moment.DRAINING else None,
            "settle": rng.choice(["batch", "yield"]),
            "num_workers": rng.choice([1, 2]),
            "wire": rng.choice(["fast", "fast", "plain"]),
        }
        async with consumer(tmp_path, number, **settings, **options) as victim:
            if moment is Moment.ANY:
                await victim.noted("started")
                await asyncio.sleep(rng.uniform(0, 0.15))
                victim.send(signal.SIGKILL)
            assert -signal.SIGKILL == await victim.ended(), victim.said[-4000:]
            died = [*victim.of("died"), time.time()][0]
            lives.append(life(victim.entries, died))

    async with consumer(tmp_path, LIVES, **settings) as last:
        await last.noted("started")
        # A copy may still be there of what is done or dead already, and is handled once more.
        good = {each for each, kind in kinds.items() if kind not in {"bad", "doomed"}}
        before = set().union(*(each.done for each in lives))
        await until(lambda: good <= before.union(last.of("done")), what=lambda: last.said[-4000:])
        await until(lambda: _is_idle(broker.url, name, last))
        last.send(signal.SIGTERM)
        assert 0 == await last.ended(), last.said[-4000:]
        lives.append(life(last.entries, float("inf")))

    dead = Counter(json.loads(each.body)["id"] for each in await take_all(channel, dlq))
    left = await take_all(channel, name)
    outcomes = sum((each.done for each in lives), dead)
    may_repeat = sum((each.in_hand for each in lives[:-1]), Counter[int]())
    repeated = outcomes - Counter(dict.fromkeys(outcomes, 1))
    lost = kinds.keys() - outcomes.keys()
    keep_figures(
        Figures(
            fault=f"client killed {moment}, {queue_type}",
            did=f"SIGKILL for the consumer's process, {LIVES} times, each time with"
            f" {PER_LIFE} new messages.",
            wire="both",
            broker=broker.version,
            messages=len(kinds),
            handled=len(kinds.keys() & outcomes.keys()),
            duplicated=repeated.total(),
            lost=len(lost),
            recovery=None,
        )
    )

    assert [] == left
    assert set() == lost
    assert good == set().union(*(each.done for each in lives))
    assert kinds.keys() - good == dead.keys()
    # Each repetition is owed to a kill that found the message unsettled.
    assert Counter() == repeated - may_repeat


async def _is_idle(url: str, queue: str, app: App) -> bool:
    """Whether nothing is ready, and all that was delivered is settled."""
    await holds(url, queue, 0)
    delivered = sum(len(tags) for _, tags in app.of("delivered"))
    settled = sum(len(tags) for _, _, tags in app.of("settled"))
    await asyncio.sleep(0.2)
    return delivered == settled and delivered == sum(len(tags) for _, tags in app.of("delivered"))
