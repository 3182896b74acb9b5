"""Does what a peer should never send do any harm? A few of the inputs of ``nox -s fuzz``."""

from __future__ import annotations

from random import Random

import pytest

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize(("target", "count"), [("split", 1500), ("read", 5000), ("copy", 3000)])
def test_nothing_that_arrives_breaks_a_promise(target: str, count: int) -> None:
    """No exception, the same news for all cuts, little memory, and what pamqp reads is read."""
    for number in range(count):
        TARGETS[target](Random(number))
