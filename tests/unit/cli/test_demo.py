"""Tests of the demo: its counters, its dashboard, and the check of its counts."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aio_pika_batch import MessageResult
from aio_pika_batch.cli.demo.command import (
    Dashboard,
    check_options,
    dashboard,
    describe_activity,
    sparkline,
)
from aio_pika_batch.cli.demo.orders import (
    OrderKind,
    OrderStream,
    PipelineStats,
    Rate,
    check_counts,
    number_of,
)
from aio_pika_batch.cli.demo.pipeline import DemoOptions, Pipeline
from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.results import Cause
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.observer import BatchCut, Connected, Lost, Origin, Settled
from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus
from aio_pika_batch.testing import make_message

ORIGIN = Origin("Orders", "orders", 0)


def worker(state: WorkerState = WorkerState.CONSUMING, **counts: int) -> WorkerStatus:
    """The status of a worker."""
    given = {"buffered": 0, "in_hand": 0, "held": 0, **counts}
    return WorkerStatus(
        index=0,
        state=state,
        epoch=2,
        oldest=None,
        oldest_held=None,
        last_progress=None,
        last_error=None,
        **given,
    )


# --- statistics ------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9))))
def test_rate_counts_per_second(added: list[tuple[float, int]]) -> None:
    """Each whole second has the sum of what was added in it."""
    rate = Rate()
    for moment, count in sorted(added):
        rate.add(count, moment)

    expected = [sum(n for moment, n in added if int(moment) == second) for second in range(51)]
    assert expected == rate.past(51.0, 51)


def test_rate_leaves_out_the_current_second() -> None:
    """Its count isn't complete yet."""
    rate = Rate()
    rate.add(5, 10.1)

    assert [0] == rate.past(10.9, 1)
    assert [5] == rate.past(11.0, 1)


def test_stats_count_events() -> None:
    """Batches by trigger, results by name, lost connections."""
    stats = PipelineStats(lambda: 3.0)
    stats.connected(ORIGIN, Connected(1))
    stats.batch_cut(ORIGIN, BatchCut([make_message(b"")] * 4, Trigger.SIZE, 0.1))
    stats.settled(
        ORIGIN,
        Settled({(MessageResult.ACK, Cause.HANDLER): 3, (None, Cause.SHUTDOWN): 1}, 0.01),
    )
    stats.lost(ORIGIN, Lost(1, OSError()))

    stage = stats.stage("Orders")
    assert {"size": 1} == stage.triggers
    assert {"ACK": 3, "returned": 1} == stage.settled
    assert 4.0 == stage.batch_size
    assert 1 == stage.lost_connections
    assert [4] == stage.rate.past(4.0, 1)


def test_latency_is_known_after_two_arrivals() -> None:
    """Median, 95 %, worst."""
    stats = PipelineStats(lambda: 0.0)
    stats.arrived(1.0)
    assert stats.latency is None

    for each in range(100):
        stats.arrived(each / 100)
    assert stats.latency is not None
    assert (0.5, 1.0) == (round(stats.latency.median, 1), stats.latency.worst)


# --- dashboard -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "drawn"), [([], ""), ([0, 0], "  "), ([0, 4, 8], " ▄█"), ([1, 1000], "▁█")]
)
def test_sparkline_draws_a_bar_for_every_count_above_zero(counts: list[int], drawn: str) -> None:
    """Only 0 is blank."""
    assert drawn == sparkline(counts)


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (worker(), "idle"),
        (worker(buffered=3), "collecting 3"),
        (worker(buffered=3, held=2), "holding 2"),
        (worker(buffered=3, in_hand=5), "handling 5"),
        (worker(WorkerState.WAITING, buffered=3), "waiting"),
    ],
)
def test_activity_of_a_worker_is_the_furthest_step(status: WorkerStatus, word: str) -> None:
    """Handling before holding before collecting."""
    assert word == describe_activity(status)


@given(
    width=st.integers(60, 200),
    states=st.lists(st.sampled_from(WorkerState), max_size=4),
    count=st.integers(0, 10**7),
)
def test_no_line_is_wider_than_the_terminal(
    width: int, states: list[WorkerState], count: int
) -> None:
    """Whatever the counts."""
    stats = PipelineStats(lambda: 100.0)
    stage = stats.stage("Orders")
    for result in ("ACK", "NACK", "REQUEUE", "REQUEUE_IMMEDIATE", "returned"):
        stage.settled[result] = count
    for reason in ("rejected", "exhausted", "handler-error", "undecodable"):
        stage.dead[reason] = count
    stage.rate.add(count, 99.0)
    workers = tuple(worker(state, in_hand=count) for state in states)
    status = ConsumerStatus("Orders", "orders", True, True, workers)
    board = Dashboard(
        "aio-pika-batch", stats, {"Orders": 50, "Invoices": 100}, {"Orders": status}, "foot"
    )
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=False).print(board)

    lines = output.getvalue().splitlines()
    assert {width} == {len(line) for line in lines}
    assert "Invoices" in output.getvalue()


# --- final check -----------------------------------------------------------------

DRAWN = Counter({OrderKind.GOOD: 90, OrderKind.BAD: 3, OrderKind.FLAKY: 6, OrderKind.HOPELESS: 1})
REASONS = Counter(undecodable=3, exhausted=1)
INVOICES = Counter(range(96))
DEAD = Counter(range(96, 100))


def is_ok(
    invoices: Counter[int] = INVOICES,
    dead: Counter[int] = DEAD,
    reasons: Counter[str] = REASONS,
    *,
    retries: int = 15,
    lost: int = 0,
) -> bool:
    """Whether all counts match."""
    checks = check_counts(
        DRAWN, invoices, dead, reasons, retries=retries, attempts=3, lost_connections=lost
    )
    return all(each.is_ok for each in checks)


def test_counts_match_if_every_order_finished_once() -> None:
    """96 invoices, 4 dead letters, 2 × 6 + 3 × 1 retries."""
    assert is_ok()


def test_a_lost_order_fails_the_check() -> None:
    """Even if a connection was lost."""
    assert not is_ok(invoices=Counter(range(95)))
    assert not is_ok(invoices=Counter(range(95)), lost=1)


def test_a_repeated_order_fails_the_check_unless_a_connection_was_lost() -> None:
    """Then at-least-once delivery allows it."""
    twice = Counter({**INVOICES, 7: 2})
    assert not is_ok(invoices=twice)
    assert is_ok(invoices=twice, lost=1)


def test_an_extra_or_missing_retry_fails_the_check_unless_a_connection_was_lost() -> None:
    """A copy that a lost connection leaves unconfirmed isn't counted, but may be stored."""
    for retries in (14, 16):
        assert not is_ok(retries=retries)
        assert is_ok(retries=retries, lost=1)


# --- orders and options ----------------------------------------------------------


def test_orders_are_the_same_for_the_same_seed() -> None:
    """The number can be read from every body, whether it is JSON or not."""
    bodies = OrderStream(7).take(500, 0.0)

    assert bodies == OrderStream(7).take(500, 0.0)
    assert list(range(500)) == [number_of(body) for body in bodies]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (DemoOptions(rate=0), "--rate: must be greater than 0, not 0"),
        (DemoOptions(seconds=-1), "--seconds: must be greater than 0, not -1"),
        (DemoOptions(batch_size=0), "--batch-size: must be greater than 0"),
        (DemoOptions(workers=0), "--workers: must be greater than 0"),
    ],
)
def test_invalid_options_are_refused(options: DemoOptions, words: str) -> None:
    """The error names the option."""
    with pytest.raises(ConfigurationError, match=words):
        check_options("memory://", options)


def test_chaos_needs_a_broker_in_memory() -> None:
    """Connections to a real broker are never cut."""
    with pytest.raises(ConfigurationError, match="leave out --url"):
        check_options("amqp://localhost", DemoOptions(chaos=True))


def test_the_dashboard_shows_no_password() -> None:
    """The URL is masked."""
    board = dashboard(Pipeline("amqp://u:secret@h/", DemoOptions()))

    assert "secret" not in board.title
