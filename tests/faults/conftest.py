"""Fixtures of the fault tests: a consumer under load, and a place for its figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.figures import VARIABLE, Figures, keep, this_machine
from tests.faults.trial import Trial, under_load
from tests.integration.helpers import skip_without_amqp10
from tests.support.find import RunningBroker

if TYPE_CHECKING:
    from aio_pika_batch.transport import Wire

_FIGURES = pytest.StashKey[list[Figures]]()

Run = Callable[..., AbstractAsyncContextManager[Trial]]


OVER_091 = ["fast", pytest.param("plain", marks=pytest.mark.long)]
"""The wires of faults that a quorum queue, or a consumer without copies, doesn't have."""

OVER_10 = pytest.param("amqp10", marks=pytest.mark.long)


@pytest.fixture(params=[*OVER_091, OVER_10])
def wire(request: pytest.FixtureRequest, broker: RunningBroker) -> Wire:
    """Each wire. Over AMQP 1.0, queues are quorum queues."""
    if request.param == "amqp10":
        skip_without_amqp10(broker)
    found: Wire = request.param
    return found


@pytest.fixture
def keep_figures(pytestconfig: pytest.Config) -> Callable[[Figures], None]:
    """Collect the figures of a trial to report them, and store them if a file is named."""

    def take(figures: Figures) -> None:
        pytestconfig.stash.setdefault(_FIGURES, []).append(figures)
        if file := os.environ.get(VARIABLE):
            keep(Path(file), [figures], this_machine())

    return take


@pytest.fixture
def run(broker: RunningBroker, name: str, keep_figures: Callable[[Figures], None]) -> Run:
    """Start a trial on this broker; pass the name of the fault and a description."""
    return partial(
        under_load, urls=[broker.url], broker=broker.version, name=name, keep=keep_figures
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Report the figures."""
    if _FIGURES not in config.stash:
        return
    terminalreporter.section("figures: messages, handled, duplicated, lost, seconds to recover")
    for each in config.stash[_FIGURES]:
        recovery = "-" if each.recovery is None else f"{each.recovery:.1f}"
        terminalreporter.write_line(
            f"{each.messages:6} {each.handled:6} {each.duplicated:5} {each.lost:3} {recovery:>5}"
            f"  {each.fault}, {each.wire}"
        )
