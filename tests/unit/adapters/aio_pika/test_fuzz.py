"""A few of the inputs of ``nox -s fuzz``: what a peer should never send does no harm."""

from __future__ import annotations

from random import Random

import pytest

from tests.fuzz.targets import TARGETS


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("split", 1500),
        ("read", 5000),
        ("copy", 3000),
        ("amqp10", 300),
        ("amqp10 sections", 3000),
        ("amqp10 values", 3000),
    ],
)
def test_fuzzed_input_breaks_no_promise(target: str, count: int) -> None:
    """No exception, the same events for all cuts, little memory, and what pamqp reads is read."""
    for number in range(count):
        TARGETS[target](Random(number))
