"""What works, and would still surprise somebody: it is said once, at the start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.advice import advice
from aio_pika_batch.core.topology import Wanted
from tests.unit.core.strategies import wanted

SOUND = Wanted(queue_name="jobs", dead_letter_exchange="dlx")


@given(wanted, st.integers(0, 100), st.integers(1, 100))
def test_each_finding_names_the_setting_that_mends_it(settings, prefetch, batch_size):
    """Nobody is told of a trouble without the way out, nor twice of one."""
    found = advice(settings, prefetch=prefetch, batch_size=batch_size)

    for line in found:
        assert any(
            name in line for name in ("prefetch_count", "dead_letter_exchange", "queue_arguments")
        )
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("prefetch", "batch_size", "said"),
    [(0, 100, False), (9, 10, True), (10, 10, False), (11, 10, False), (1, 1, False)],
)
def test_a_prefetch_below_the_batch_size_is_told(prefetch, batch_size, said):
    """No batch would ever be full; 0 means no limit."""
    found = advice(SOUND, prefetch=prefetch, batch_size=batch_size)

    assert said is any(
        line.startswith(f"prefetch_count={prefetch} is below batch_size={batch_size}")
        for line in found
    )
    assert said is bool(found)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({}, True),
        ({"dead_letter_exchange": "dlx"}, False),
        ({"dead_letter_queue": "dlq"}, False),
        ({"queue_arguments": {"x-dead-letter-exchange": "dlx"}}, False),
        ({"dead_letter_routing_key": "dead"}, True),
    ],
)
def test_that_failures_may_be_discarded_is_told(stated, said):
    """Without a dead-letter exchange it is up to the broker's policies."""
    found = advice(Wanted(queue_name="jobs", **stated), prefetch=10, batch_size=10)

    assert said is any("no dead-letter exchange is known" in line for line in found)
    assert said is bool(found)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"queue_type": "quorum"}, True),
        ({"queue_arguments": {"x-queue-type": "quorum"}}, True),
        ({"queue_type": "quorum", "queue_arguments": {"x-dead-letter-exchange": "dlx"}}, False),
        ({"queue_type": "classic"}, False),
        ({}, False),
    ],
)
def test_that_a_quorum_queue_drops_past_its_delivery_limit_is_told(stated, said):
    """A dead-letter exchange that only the settings name does not help: the broker knows none."""
    settings = Wanted(queue_name="jobs", dead_letter_exchange="dlx", **stated)

    found = advice(settings, prefetch=10, batch_size=10)

    assert said is any("x-delivery-limit" in line for line in found)
    assert said is bool(found)
