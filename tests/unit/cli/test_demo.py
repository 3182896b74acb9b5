"""Does the demo count right, draw within its width, and notice when the books do not balance?"""

from __future__ import annotations

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aio_pika_batch import MessageResult
from aio_pika_batch.cli.demo.books import balance
from aio_pika_batch.cli.demo.command import check
from aio_pika_batch.cli.demo.dashboard import Dashboard, sparkline, what_it_does
from aio_pika_batch.cli.demo.figures import Figures, Rate
from aio_pika_batch.cli.demo.load import Kind, Stream, number_of
from aio_pika_batch.cli.demo.pipeline import Load, Pipeline
from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.results import Cause
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.observer import BatchCut, Connected, Lost, Origin, Settled
from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus
from aio_pika_batch.testing import make_message

ORIGIN = Origin("Orders", "orders", 0)


def worker(state: WorkerState = WorkerState.CONSUMING, **counts: int) -> WorkerStatus:
    """A worker as it may be."""
    given = {"buffered": 0, "in_hand": 0, "held": 0, **counts}
    return WorkerStatus(
        index=0,
        state=state,
        epoch=2,
        oldest=None,
        last_progress=None,
        last_error=None,
        **given,
    )


# --- figures --------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9))))
def test_a_rate_counts_each_second(added: list[tuple[float, int]]) -> None:
    """What fell into a whole second is its count."""
    rate = Rate()
    for moment, count in sorted(added):
        rate.add(count, moment)

    expected = [sum(n for moment, n in added if int(moment) == second) for second in range(51)]
    assert expected == rate.past(51.0, 51)


def test_a_second_that_is_not_over_does_not_count() -> None:
    """It would always be too little."""
    rate = Rate()
    rate.add(5, 10.1)

    assert [0] == rate.past(10.9, 1)
    assert [5] == rate.past(11.0, 1)


def test_an_observer_counts_what_it_is_told() -> None:
    """Batches by trigger, results by name, lost connections."""
    figures = Figures(lambda: 3.0)
    figures.connected(ORIGIN, Connected(1))
    figures.batch_cut(ORIGIN, BatchCut([make_message(b"")] * 4, Trigger.SIZE, 0.1))
    figures.settled(
        ORIGIN,
        Settled({(MessageResult.ACK, Cause.HANDLER): 3, (None, Cause.SHUTDOWN): 1}, 0.01),
    )
    figures.lost(ORIGIN, Lost(1, OSError()))

    stage = figures.stage("Orders")
    assert {"size": 1} == stage.triggers
    assert {"ACK": 3, "returned": 1} == stage.settled
    assert 4.0 == stage.fill
    assert 1 == stage.losses
    assert [4] == stage.rate.past(4.0, 1)


def test_latency_is_known_once_two_have_arrived() -> None:
    """Median, 95 %, worst."""
    figures = Figures(lambda: 0.0)
    figures.arrived(1.0)
    assert figures.latency is None

    for each in range(100):
        figures.arrived(each / 100)
    assert figures.latency is not None
    assert (0.5, 1.0) == (round(figures.latency.median, 1), figures.latency.worst)


# --- the picture ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "drawn"), [([], ""), ([0, 0], "  "), ([0, 4, 8], " ▄█"), ([1, 1000], "▁█")]
)
def test_a_sparkline_shows_the_least_as_more_than_nothing(counts: list[int], drawn: str) -> None:
    """Only zero is a blank."""
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
def test_a_worker_does_one_thing(status: WorkerStatus, word: str) -> None:
    """The most telling one."""
    assert word == what_it_does(status)


@given(
    width=st.integers(60, 200),
    states=st.lists(st.sampled_from(WorkerState), max_size=4),
    count=st.integers(0, 10**7),
)
def test_no_line_is_wider_than_the_terminal(
    width: int, states: list[WorkerState], count: int
) -> None:
    """Whatever is on the board."""
    figures = Figures(lambda: 100.0)
    stage = figures.stage("Orders")
    for result in ("ACK", "NACK", "REQUEUE", "REQUEUE_IMMEDIATE", "returned"):
        stage.settled[result] = count
    for reason in ("rejected", "exhausted", "handler-error", "undecodable"):
        stage.dead[reason] = count
    stage.rate.add(count, 99.0)
    workers = tuple(worker(state, in_hand=count) for state in states)
    status = ConsumerStatus("Orders", "orders", True, True, workers)
    board = Dashboard(
        "aio-pika-batch", figures, {"Orders": 50, "Invoices": 100}, {"Orders": status}, "foot"
    )
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=False).print(board)

    lines = output.getvalue().splitlines()
    assert {width} == {len(line) for line in lines}
    assert "Invoices" in output.getvalue()


# --- the books ------------------------------------------------------------------

DRAWN = Counter({Kind.GOOD: 90, Kind.BAD: 3, Kind.FLAKY: 6, Kind.HOPELESS: 1})
REASONS = Counter(undecodable=3, exhausted=1)
INVOICES = Counter(range(96))
DEAD = Counter(range(96, 100))


def is_balanced(
    invoices: Counter[int] = INVOICES,
    dead: Counter[int] = DEAD,
    reasons: Counter[str] = REASONS,
    *,
    retries: int = 15,
    lost: int = 0,
) -> bool:
    """Whether all rows are."""
    rows = balance(
        DRAWN, invoices, dead, reasons, retries=retries, attempts=3, lost_connections=lost
    )
    return all(row.is_balanced for row in rows)


def test_books_balance_when_everything_came_to_its_end_once() -> None:
    """96 invoices, 4 dead letters, 2 × 6 + 3 × 1 retries."""
    assert is_balanced()


def test_a_lost_order_is_noticed() -> None:
    """Be a connection lost or not."""
    assert not is_balanced(invoices=Counter(range(95)))
    assert not is_balanced(invoices=Counter(range(95)), lost=1)


def test_a_repetition_is_noticed_unless_a_connection_was_lost() -> None:
    """Then it is what at-least-once means."""
    twice = Counter({**INVOICES, 7: 2})
    assert not is_balanced(invoices=twice)
    assert is_balanced(invoices=twice, lost=1)


def test_a_retry_too_many_is_noticed_unless_a_connection_was_lost() -> None:
    """The same."""
    assert not is_balanced(retries=16)
    assert is_balanced(retries=16, lost=1)
    assert not is_balanced(retries=14, lost=1)


# --- the load -------------------------------------------------------------------


def test_a_stream_is_the_same_for_the_same_seed() -> None:
    """And each order tells its number, whether it is JSON or not."""
    bodies = Stream(7).take(500, 0.0)

    assert bodies == Stream(7).take(500, 0.0)
    assert list(range(500)) == [number_of(body) for body in bodies]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (Load(rate=0), "--rate: must be more than 0, not 0"),
        (Load(seconds=-1), "--seconds: must be more than 0, not -1"),
        (Load(batch_size=0), "--batch-size: must be more than 0"),
        (Load(workers=0), "--workers: must be more than 0"),
    ],
)
def test_a_load_that_is_none_is_refused(load: Load, words: str) -> None:
    """With the option's name."""
    with pytest.raises(ConfigurationError, match=words):
        check("memory://", load)


def test_chaos_is_for_a_broker_in_memory() -> None:
    """Nobody's real connections are cut."""
    with pytest.raises(ConfigurationError, match="leave out --url"):
        check("amqp://localhost", Load(chaos=True))


def test_a_password_is_not_on_the_board() -> None:
    """The URL is masked."""
    from aio_pika_batch.cli.demo.show import dashboard

    board = dashboard(Pipeline("amqp://u:secret@h/", Load()))

    assert "secret" not in board.title
