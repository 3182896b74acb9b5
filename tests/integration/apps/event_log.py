"""How does a program that may be killed at any moment leave word of what it has done?

One line for each thing, in one write of its own, to a file opened for appending: what was written
is in the kernel's hands, and SIGKILL takes nothing from those.
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
