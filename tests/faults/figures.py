"""The figures of the fault tests, and the file that stores them.

The file has one line of JSON for each fault, and is part of the project, as is the page that is
made from it. A run of some tests replaces their lines, and keeps the others. So another RabbitMQ,
or a part of the suite, can be run without the rest.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("figures.jsonl")
VARIABLE = "AIO_PIKA_BATCH_TEST_FIGURES"
"""The file that stores the figures; if it is not set, they are not stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one trial.

    Attributes:
        fault: The fault in a few words; the name of the line in the table.
        did: What was done, in a sentence.
        wire: The wire of the adapter, ``fast``, ``plain`` or ``amqp10``.
        broker: The version of RabbitMQ.
        messages: The number of messages that the broker has confirmed.
        handled: How many of these were ACKed by the handler, or dead-lettered.
        duplicated: How often a message was handled or dead-lettered needlessly.
        lost: How many were neither handled, nor dead-lettered, nor in the queue at the end.
        recovery: Seconds from the end of the fault to the first message handled after it, the
            longest if there were several; None if there was nothing to recover from.
        remark: A remark that readers of the figures need.
    """

    fault: str
    did: str
    wire: str
    broker: str
    messages: int
    handled: int
    duplicated: int
    lost: int
    recovery: float | None
    remark: str = ""

    @property
    def key(self) -> tuple[tuple[int, ...], str, str]:
        """The key: new figures replace those of the same fault, wire and broker."""
        return _numbers(self.broker), self.fault, self.wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine and revision of some figures.

    Attributes:
        revision: The last commit that changed what is shipped, with a mark for local changes.
        processors: The number of processors.
        python: The version of Python.
    """

    revision: str
    processors: int
    python: str


Kept = dict[tuple[tuple[int, ...], str, str], tuple[Figures, Machine]]


def this_machine() -> Machine:
    """Return this machine, with the last commit that changed what is shipped."""
    head = _git("log", "-1", "--format=%h", "--", "src")  # tests alone change no figure
    changed = _git("status", "--porcelain", "--", "src")
    return Machine(
        revision=head + (" with changes" if changed else ""),
        processors=os.cpu_count() or 1,
        python=platform.python_version(),
    )


def load(file: Path) -> Kept:
    """Return all stored figures, in the order of brokers and faults."""
    if not file.exists():
        return {}
    kept: Kept = {}
    for line in file.read_text().splitlines():
        content = json.loads(line)
        figures = Figures(**content["figures"])
        kept[figures.key] = figures, Machine(**content["machine"])
    return dict(sorted(kept.items()))


def keep(file: Path, new: Iterable[Figures], machine: Machine) -> None:
    """Store new figures in place of older ones of the same fault, wire and broker."""
    kept = load(file) | {each.key: (each, machine) for each in new}
    lines = [
        json.dumps({"figures": asdict(figures), "machine": asdict(machine)})
        for _, (figures, machine) in sorted(kept.items())
    ]
    file.write_text("".join(f"{line}\n" for line in lines))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
