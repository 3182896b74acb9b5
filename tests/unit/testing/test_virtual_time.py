"""Virtual time: sleeping takes no time, and a test that would hang gets an error that says why."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time

import pytest

from aio_pika_batch.testing.virtual_time import (
    NothingLeftToHappen,
    TimeRunsAway,
    TimeStandsStill,
    VirtualTimeLoop,
    run,
)


def test_a_long_sleep_takes_no_time_and_ends_when_it_should():
    """The clock jumps to the next timer, and the loop's own clock shows it."""

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        before = loop.time()
        await asyncio.sleep(3600)
        return before, loop.time()

    began = time.monotonic()

    assert run(main()) == (0.0, 3600.0)
    assert time.monotonic() - began < 5


def test_timers_fire_in_order_and_in_time():
    """Each sleeper sees the time for which it asked."""

    async def sleeper(delay: float, seen: list[float]) -> None:
        await asyncio.sleep(delay)
        seen.append(asyncio.get_running_loop().time())

    async def main() -> list[float]:
        seen: list[float] = []
        await asyncio.gather(*(sleeper(delay, seen) for delay in (7.5, 0.1, 3)))
        return seen

    assert run(main()) == [0.1, 3.0, 7.5]


def test_time_stands_still_while_anything_is_ready():
    """A task that yields a thousand times is faster than a timer of a millisecond."""

    async def main() -> float:
        asyncio.get_running_loop().call_later(0.001, lambda: None)
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert run(main()) == 0.0


def test_timeouts_work():
    """`asyncio.timeout` cancels at its virtual deadline."""

    async def main() -> float:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(25):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(main()) == 25.0


@pytest.mark.parametrize("start", [0.0, 1e6 / 3, 1.7e9, 1e12])
def test_a_timer_is_reached_however_late_it_is(start):
    """Rounding at large times causes neither a hang nor a busy loop."""

    async def main() -> None:
        for _ in range(1000):
            await asyncio.sleep(1 / 3)

    run(main(), start=start, horizon=1e6, max_iterations=100)


def test_timers_are_reached_even_after_very_long():
    """The clock resolution grows while the loop runs."""

    async def main() -> None:
        await asyncio.sleep(1e9)
        for _ in range(1000):
            await asyncio.sleep(1 / 3)

    run(main(), horizon=1e10, max_iterations=100)


def test_a_sleep_beyond_a_day_is_reached_in_steps():
    """The loop never asks its selector for more than a day; longer sleeps still end in time."""

    async def main() -> float:
        await asyncio.sleep(1e6)
        return asyncio.get_running_loop().time()

    assert run(main(), horizon=1e7) == 1e6


def test_nothing_left_to_happen_names_tasks_and_their_lines():
    """Instead of hanging, it lists the pending tasks, with the line in which they wait."""

    async def wait_in_vain() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        lonely = asyncio.create_task(wait_in_vain(), name="lonely")
        await asyncio.sleep(5)
        await lonely

    with pytest.raises(NothingLeftToHappen, match="nothing left to happen at 5 s") as caught:
        run(main())
    assert "'lonely'" in str(caught.value)
    assert "wait_in_vain" in str(caught.value)
    assert "locks.py" in str(caught.value)


def test_only_some_of_very_many_waiting_tasks_are_named():
    """The error stays readable."""

    async def main() -> None:
        await asyncio.gather(*(asyncio.Event().wait() for _ in range(200)))

    with pytest.raises(NothingLeftToHappen, match="and 181 more"):
        run(main())


def test_a_loop_without_tasks_that_waits_for_a_future_is_diagnosed():
    """run_until_complete of a bare future raises, too."""
    loop = VirtualTimeLoop()
    try:
        with pytest.raises(NothingLeftToHappen, match="no task at all"):
            loop.run_until_complete(loop.create_future())
    finally:
        loop.close()


def test_time_stands_still_names_the_busiest_callbacks():
    """And how often they ran."""

    async def busy() -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    async def main() -> None:
        hot = asyncio.create_task(busy(), name="hot")
        await asyncio.sleep(1)
        hot.cancel()

    with pytest.raises(TimeStandsStill, match="time stands still at 0 s: 2000 rounds") as caught:
        run(main(), max_iterations=2000)
    assert "x task 'hot'" in str(caught.value)


def test_a_callback_that_reschedules_itself_is_named():
    """A busy loop need not be a task."""

    def again() -> None:
        asyncio.get_running_loop().call_soon(again)

    async def main() -> None:
        again()
        await asyncio.sleep(1)

    with pytest.raises(TimeStandsStill, match=r"callback .*again"):
        run(main(), max_iterations=2000)


def test_tiny_timers_count_as_a_standstill():
    """Timers of a nanosecond do not hide a busy loop."""

    async def main() -> None:
        for _ in itertools.count():
            await asyncio.sleep(1e-9)

    with pytest.raises(TimeStandsStill):
        run(main(), max_iterations=2000)


def test_many_rounds_are_fine_if_time_passes():
    """The count of rounds restarts when time has passed."""

    async def main() -> None:
        for _ in range(5000):
            await asyncio.sleep(0.01)

    run(main(), max_iterations=100)


def test_time_runs_away_is_raised_at_the_horizon():
    """A heartbeat must not hide that the test hangs."""

    async def heartbeat() -> None:
        for _ in itertools.count():
            await asyncio.sleep(10)

    async def main() -> None:
        beating = asyncio.create_task(heartbeat(), name="heartbeat")
        await asyncio.Event().wait()
        await beating

    with pytest.raises(TimeRunsAway, match="'heartbeat'"):
        run(main(), horizon=600)


def test_cleaning_up_after_time_ran_away_may_still_sleep():
    """A `finally` clause gets the time that it needs."""
    slept = []

    async def main() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(5)
            slept.append(asyncio.get_running_loop().time())

    with pytest.raises(TimeRunsAway):
        run(main(), horizon=600)
    assert slept == [1005.0]


def test_threads_are_waited_for_and_take_no_virtual_time():
    """A timer does not overtake work in a thread, and the executor is shut down properly."""
    release = threading.Event()

    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(0.001, release.set)
        waited = asyncio.create_task(asyncio.to_thread(threading.Event().wait, 0.05))
        await waited
        return loop.time()

    assert run(main()) == 0.0
    assert not release.is_set()


def test_a_call_from_another_thread_wakes_the_loop():
    """`call_soon_threadsafe`, while the loop waits for a thread."""

    async def main() -> str:
        loop = asyncio.get_running_loop()
        called: asyncio.Future[str] = loop.create_future()
        await asyncio.to_thread(loop.call_soon_threadsafe, called.set_result, "from afar")
        return await called

    assert run(main()) == "from afar"


def test_a_thread_that_never_ends_raises():
    """The real time to wait for threads is limited."""
    release = threading.Event()

    async def main() -> None:
        try:
            await asyncio.to_thread(release.wait)
        finally:
            release.set()

    with pytest.raises(NothingLeftToHappen, match="1 jobs in threads"):
        run(main(), thread_patience=0.05)


def test_run_returns_and_raises_what_the_coroutine_does():
    """As `asyncio.run` does."""

    async def fails() -> None:
        raise LookupError("as it is")

    async def answers() -> int:
        return 42

    assert run(answers()) == 42
    with pytest.raises(LookupError, match="as it is"):
        run(fails())
