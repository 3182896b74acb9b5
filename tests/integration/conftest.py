"""Fixtures of all integration tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def retries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries follow at once, unless a test sets `requeue_delay`: most are about other things.

    Consumers that tests start as processes inherit it.
    """
    monkeypatch.setenv("AIO_PIKA_BATCH_REQUEUE_DELAY", "0")
