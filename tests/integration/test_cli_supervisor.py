"""Tests of the supervisor: crashes, hangs, drains, rolling restarts, and its own end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest

from tests.integration.helpers import (
    PATIENCE,
    SLACK,
    App,
    Stopwatch,
    command_line,
    holds,
    is_running,
    publish,
    ready,
    shop,
    take_all,
    until,
)

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel


def orders(count: int, kind: str = "good", first: int = 0) -> list[bytes]:
    """Return messages for the consumer of apps/shop.py."""
    return [json.dumps({"id": first + each, "kind": kind}).encode() for each in range(count)]


BATCHES = {"AIO_PIKA_BATCH_BATCH_SIZE": "10", "AIO_PIKA_BATCH_BATCH_TIMEOUT": "0.1"}

SHARED = {**BATCHES, "AIO_PIKA_BATCH_PREFETCH_COUNT": "10"}
"""With a prefetch of one batch, two processes get one each."""


async def put(channel: AbstractChannel, queue: str, bodies: list[bytes]) -> None:
    """Publish to a queue that the program may not have declared yet."""
    await channel.declare_queue(queue, durable=True)
    await publish(channel, bodies, routing_key=queue)


async def address(program: App) -> str:
    """Return the address of its health endpoints, from its log."""
    pattern = re.compile(r'"url": "(http://127\.0\.0\.1:\d+)"')
    found = await until(lambda: pattern.search(program.printed), what=lambda: program.printed)
    return found[1]


def get(url: str) -> str:
    """Request a URL."""
    with urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310  -- it is our own
        return answer.read().decode()


async def is_ready(url: str) -> None:
    """Wait until the readiness probe succeeds."""

    def look() -> bool:
        try:
            return get(f"{url}/readyz") == "ok\n"
        except OSError:
            return False

    await until(look)


@pytest.mark.long
async def test_a_killed_process_is_replaced_and_its_messages_are_handled(
    channel, amqp_url, name, tmp_path
) -> None:
    """The health endpoints cover all processes."""
    arguments = shop("--processes", "2", "--health-port", "0")
    async with command_line(tmp_path, *arguments, queue=name, url=amqp_url, **BATCHES) as program:
        url = await address(program)
        await is_ready(url)
        assert 2 == len(program.of("started"))
        await put(channel, name, [*orders(1, "lethal-once"), *orders(40, first=1)])
        await program.noted("started", 3)
        await until(lambda: set(range(41)) == set(program.of("done")), what=lambda: program.printed)
        await is_ready(url)
        status = json.loads(get(f"{url}/status"))
        assert [0, 1] == sorted(each["restarts"] for each in status["processes"])
        up = f'aio_pika_batch_worker_up{{consumer="Importer",queue="{name}"}} 2.0'
        assert up in get(f"{url}/metrics")
        assert "ok\n" == get(f"{url}/livez")
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
    assert "by SIGKILL" in program.printed


async def test_a_killed_process_that_had_forked_is_replaced(tmp_path) -> None:
    """What it had forked is killed: it would keep the socket to the supervisor open."""
    async with command_line(tmp_path, *shop("-n", "1"), url="memory://", MISHAP="forks") as program:
        await program.noted("forked")
        [first], [forked] = program.of("started"), program.of("forked")
        os.kill(first, signal.SIGKILL)
        await program.noted("started", 2)
        await until(lambda: not is_running(forked), what=lambda: program.printed)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed


@pytest.mark.long
async def test_a_paused_supervisor_kills_no_process(tmp_path) -> None:
    """However long it was stopped."""
    arguments = shop("-n", "1", "--hung-after", "2")
    async with command_line(tmp_path, *arguments, url="memory://") as program:
        await program.noted("started")
        program.send(signal.SIGSTOP)
        await asyncio.sleep(6)
        program.send(signal.SIGCONT)
        await until(lambda: "the supervisor was paused" in program.printed)
        await asyncio.sleep(1.5)
        assert 1 == len(program.of("started"))
        assert "killing" not in program.printed
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed


async def test_a_signal_to_the_whole_group_drains_processes_that_still_import(tmp_path) -> None:
    """As systemd sends it."""
    async with command_line(tmp_path, *shop("-n", "2"), url="memory://") as program:
        await until(lambda: '"started"' in program.printed)
        [child] = re.findall(r'"started".*?"pid": (\d+)', program.printed)
        os.kill(int(child), signal.SIGTERM)
        os.kill(int(child), signal.SIGINT)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
    assert "Traceback" not in program.printed


@pytest.mark.long
async def test_a_process_with_a_blocked_event_loop_is_killed_and_replaced(
    channel, amqp_url, name, tmp_path
) -> None:
    """It sends no heartbeats, and only SIGKILL ends it."""
    arguments = shop("-n", "1", "--hung-after", "2")
    async with command_line(tmp_path, *arguments, queue=name, url=amqp_url, **BATCHES) as program:
        await program.noted("started")
        await put(channel, name, orders(5, "hangs-once"))
        await program.noted("hangs")
        await program.noted("started", 2)
        await until(lambda: set(range(5)) == set(program.of("done")), what=lambda: program.printed)
        assert "a process sends no heartbeats; killing it" in program.printed
        first, second = program.of("started")
        assert first != second
        assert not is_running(first)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed


@pytest.mark.long
async def test_a_stuck_process_is_drained_and_replaced(channel, amqp_url, name, tmp_path) -> None:
    """Its event loop runs, but a message is held too long; the drain cuts the handler off."""
    stuck = {"AIO_PIKA_BATCH_STUCK_AFTER": "1", "AIO_PIKA_BATCH_SHUTDOWN_TIMEOUT": "1"}
    async with command_line(
        tmp_path, *shop("-n", "1"), queue=name, url=amqp_url, PACE="600", **stuck
    ) as program:
        await program.noted("started")
        await put(channel, name, orders(1))
        await program.noted("started", 2)
        assert "holds a message longer than stuck_after" in program.printed


async def test_sigterm_drains_every_process(channel, amqp_url, name, tmp_path) -> None:
    """Batches in progress are finished, and the rest stays in the queue."""
    arguments = shop("-n", "2", "--drain-timeout", "20")
    environment = {**BATCHES, "AIO_PIKA_BATCH_PREFETCH_COUNT": "50"}
    async with command_line(
        tmp_path, *arguments, queue=name, url=amqp_url, PACE="0.4", **environment
    ) as program:
        await program.noted("started", 2)
        await put(channel, name, orders(300))
        await program.noted("begin", 4)
        watch = Stopwatch()
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
        assert watch.seconds < 20
    assert 2 == len(program.of("on_stop"))
    begun = [each for batch in program.of("begin") for each in batch]
    assert Counter(begun) == Counter(program.of("done"))
    left = await take_all(channel, name, 300 - len(begun))
    unhandled = Counter(json.loads(message.body)["id"] for message in left)
    assert Counter(range(300)) == unhandled + Counter(begun)


async def test_a_drain_reaches_a_process_that_is_still_starting(tmp_path) -> None:
    """It drains as soon as it reads the command, and doesn't start to consume."""
    async with command_line(tmp_path, *shop("-n", "1")) as program:
        await until(lambda: '"started"' in program.printed)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
    assert "killing" not in program.printed


async def test_a_drain_that_takes_too_long_is_cut_off(channel, amqp_url, name, tmp_path) -> None:
    """With exit code 1 in time; the unsettled messages are in the queue."""
    arguments = shop("-n", "2", "--drain-timeout", "1")
    async with command_line(
        tmp_path, *arguments, queue=name, url=amqp_url, PACE="600", **SHARED
    ) as program:
        await program.noted("started", 2)
        await put(channel, name, orders(20))
        await program.noted("begin", 2)
        watch = Stopwatch()
        program.send(signal.SIGTERM)
        assert 1 == await program.ended(), program.printed
        assert watch.seconds < 1 + SLACK  # by default it would take 25 s
    assert "DrainIncomplete" in program.printed
    await holds(amqp_url, name, 20)


async def test_a_second_signal_abandons_the_drain(channel, amqp_url, name, tmp_path) -> None:
    """No message is lost."""
    async with command_line(
        tmp_path, *shop("-n", "2"), queue=name, url=amqp_url, PACE="600", **SHARED
    ) as program:
        await program.noted("started", 2)
        await put(channel, name, orders(20))
        await program.noted("begin", 2)
        program.send(signal.SIGTERM)
        await until(lambda: program.printed.count('"draining"') >= 3, what=lambda: program.printed)
        program.send(signal.SIGINT)
        assert 1 == await program.ended(within=SLACK), program.printed
    await holds(amqp_url, name, 20)


async def test_processes_drain_when_their_supervisor_is_killed(
    channel, amqp_url, name, tmp_path
) -> None:
    """By SIGKILL: the kernel closes its sockets."""
    async with command_line(
        tmp_path, *shop("-n", "2"), queue=name, url=amqp_url, PACE="0.3", **BATCHES
    ) as program:
        await program.noted("started", 2)
        await put(channel, name, orders(200))
        await program.noted("begin", 4)
        os.kill(program.process.pid, signal.SIGKILL)
        children = program.of("started")
        await until(lambda: not any(map(is_running, children)), what=lambda: program.printed)
    assert 2 == len(program.of("on_stop"))
    done = program.of("done")
    assert Counter(each for batch in program.of("begin") for each in batch) == Counter(done)
    await until(lambda: ready(amqp_url, name))
    await holds(amqp_url, name, 200 - len(done))


@pytest.mark.long
async def test_sighup_replaces_one_process_after_another(channel, amqp_url, name, tmp_path) -> None:
    """While messages arrive; none is handled twice."""
    async with command_line(
        tmp_path, *shop("-n", "2"), queue=name, url=amqp_url, PACE="0.05", **BATCHES
    ) as program:
        await program.noted("started", 2)
        await put(channel, name, orders(100))
        await program.noted("begin", 2)
        program.send(signal.SIGHUP)
        await until(
            lambda: "every process was replaced" in program.printed, what=lambda: program.printed
        )
        old, new = program.of("started")[:2], program.of("started")[2:]
        assert 2 == len(set(new) - set(old))
        assert not any(map(is_running, old))
        assert all(map(is_running, new))
        await until(lambda: len(program.of("done")) >= 100, what=lambda: program.printed)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed
    assert Counter(range(100)) == Counter(program.of("done"))
    entries = [entry["what"] for entry in program.entries]
    gone = [index for index, what in enumerate(entries) if what == "on_stop"]
    come = [index for index, what in enumerate(entries) if what == "started"]
    assert gone[0] < come[2] < gone[1] < come[3]


async def test_crash_loops_of_all_processes_end_the_supervisor(tmp_path) -> None:
    """With exit code 1 and a line in the log."""
    arguments = shop("-n", "2", "--crash-limit", "2")
    async with command_line(tmp_path, *arguments, MISHAP="crash") as program:
        assert 1 == await program.ended(), program.printed
    # The second process starts after the first heartbeat, which there may not be.
    assert program.printed.count("with exit code 7") in {2, 3, 4}
    assert 1 == program.printed.count('"giving up: ')


async def test_a_wrong_target_ends_the_supervisor(tmp_path) -> None:
    """With exit code 2; the error is printed once, not once per process."""
    async with command_line(tmp_path, "run", "no_such:thing", "--processes", "3") as program:
        assert 2 == await program.ended()
    assert 1 == program.printed.count("there is no module 'no_such'")
    assert "Traceback" not in program.printed
