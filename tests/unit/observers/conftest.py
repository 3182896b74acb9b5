"""Fixtures for tests of observers, shared with the shell's tests."""

from __future__ import annotations

from tests.unit.shell.conftest import complaints, jitter, rabbit

__all__ = ["complaints", "jitter", "rabbit"]
