"""Fixtures of the shell's tests: an in-memory broker, and a check that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest

from tests.unit.shell.helpers import QueueBroker


@pytest.fixture(autouse=True)
async def complaints():
    """Check that no exception stays unretrieved, and that no task is left."""
    before = asyncio.all_tasks()
    heard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    yield heard
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert set() == left
    gc.collect(1)
    assert [] == heard


@pytest.fixture
async def rabbit():
    """A broker with a queue."""
    made = QueueBroker()
    made.declare()
    return made


@pytest.fixture
def jitter(monkeypatch):
    """Full jitter that always takes its maximum; tests may set another number."""
    chosen = [1.0]
    monkeypatch.setattr(random, "random", lambda: chosen[0])
    return chosen
