"""What every test of an observer gets: the stage of the shell's tests, and what goes with it."""

from __future__ import annotations

from tests.unit.shell.conftest import complaints, jitter, stage

__all__ = ["complaints", "jitter", "stage"]
