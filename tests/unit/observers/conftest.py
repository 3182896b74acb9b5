"""What every test of an observer gets: the broker of the shell's tests, and what goes with it."""

from __future__ import annotations

from tests.unit.shell.conftest import complaints, jitter, rabbit

__all__ = ["complaints", "jitter", "rabbit"]
