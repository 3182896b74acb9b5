"""When the prefetch count changes, and to what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.adaptive_prefetch import (
    FIRST,
    INTERVAL,
    MOST,
    MOST_BYTES,
    WORK,
    AdaptivePrefetch,
)

MOMENTS = st.lists(
    st.tuples(
        st.floats(0, 15, allow_nan=False),  # seconds since the last settlement
        st.integers(0, 20_000),  # acked messages
        st.integers(0, 2**22),  # the size of a body
    ),
    max_size=60,
)


@given(base=st.integers(1, 1000), moments=MOMENTS)
def test_the_laws_of_an_adapting_prefetch_count(base, moments):
    """Its limits, its steps, and the time between them."""
    adaptive = AdaptivePrefetch(base, 100.0)
    now = began = 100.0
    changed_at = -INTERVAL
    acked, sizes = 0, []
    for pause, count, size in moments:
        now += pause
        adaptive.sample(size)
        sizes.append(size)
        acked += count
        before = adaptive.current
        wanted = adaptive.acked(count, now)
        assert adaptive.current == (before if wanted is None else wanted)
        assert base <= adaptive.current <= max(base, MOST)
        if wanted is not None:
            assert wanted >= 2 * before or 2 * wanted <= before
            assert now - changed_at >= INTERVAL
            assert now - 100.0 >= FIRST
            assert wanted == base or wanted <= acked / (now - began) * WORK
            assert wanted == base or wanted * sum(sizes) <= MOST_BYTES * len(sizes)
            changed_at = now
        if wanted is not None or now - began >= (INTERVAL if began == changed_at else FIRST):
            began, acked, sizes = now, 0, []


def test_it_grows_to_half_a_second_of_work():
    """As soon as the rate of a second is known."""
    adaptive = AdaptivePrefetch(10, 0.0)
    assert [None, None, None, 200] == [adaptive.acked(100, at) for at in (0.1, 0.5, 0.9, 1.0)]


def test_messages_that_are_not_acked_do_not_make_it_grow():
    """They are held, or fail."""
    adaptive = AdaptivePrefetch(10, 0.0)
    assert [None] * 50 == [adaptive.acked(0, float(at)) for at in range(50)]


def test_large_bodies_limit_it():
    """Their bytes are estimated from samples."""
    adaptive = AdaptivePrefetch(10, 0.0)
    adaptive.sample(2**20)
    adaptive.sample(0)
    assert 32 == adaptive.acked(5000, 1.0)


def test_it_shrinks_when_less_is_acked():
    """But it keeps what the batches need."""
    adaptive = AdaptivePrefetch(10, 0.0)
    assert MOST == adaptive.acked(5000, 1.0)
    assert adaptive.acked(100, 10.0) is None
    assert 10 == adaptive.acked(20, 11.0)


def test_small_changes_are_not_worth_an_interruption():
    """Neither up nor down."""
    adaptive = AdaptivePrefetch(10, 0.0)
    assert 200 == adaptive.acked(400, 1.0)
    assert adaptive.acked(7900, 11.0) is None
    assert adaptive.acked(210, 12.0) is None
    assert 100 == adaptive.acked(200, 13.0)
