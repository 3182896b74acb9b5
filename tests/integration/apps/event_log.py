"""An append-only log of what a program has done, which survives SIGKILL.

Each entry is one line, written by one system call: after that it belongs to the kernel.
"""

from __future__ import annotations

import json
import os


class EventLog:
    """A file of JSON lines."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, what: str, of: object = None) -> None:
        os.write(self._file, json.dumps({"what": what, "of": of}).encode() + b"\n")
