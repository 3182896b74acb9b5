"""Fixtures: a broker in memory, and a transport to it."""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.memory import Broker, MemoryTransport


@pytest.fixture
def memory() -> Broker:
    """A new broker."""
    return Broker("4.0")


@pytest.fixture
def transport(memory: Broker) -> MemoryTransport:
    """A transport to that broker."""
    return MemoryTransport(memory, wall_clock=lambda: 1_000_000_000.0)
