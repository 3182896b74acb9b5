"""Defines what a competitor gets, and what it answers.

A competitor is a module of ``benchmarks.competitors``, run in a process of its own with one
argument, a `Job` as JSON. It prints one line of JSON, a `Reading`, and ends::

    python -m benchmarks.competitors.pika_select '{"url": "amqp://…", "queue": "q", …}'

It must not need anything but the standard library and what it competes with.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

CELERY_TASK = "benchmarks.handle"
"""What the messages for Celery call: they have a shape of their own."""

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do.

    Attributes:
        task: What happens to a message; each competitor lists the tasks it knows.
        messages: How many to measure, after the first `warmup`. The queue holds more.
        body: Bytes in a message, for those who publish.
        options: Options that only some competitors know.
    """

    url: str
    queue: str
    task: str
    messages: int
    warmup: int = 1000
    batch: int = 100
    prefetch: int = 500
    body: int = 256
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def payload(self) -> bytes:
        """Return a body to publish."""
        return b"x" * self.body


@dataclass(kw_only=True)
class Reading:
    """What was measured, between the warm-up and the last message.

    Attributes:
        cpu: Seconds of CPU, user and system, of all threads.
        seconds: Seconds of wall-clock time.
        rss: Bytes of memory after the warm-up, at their peak until then.
        peak_rss: Return the peak memory in bytes.
        versions: Versions of the packages that did the work.
        note: What a reader should know.
    """

    messages: int
    cpu: float
    seconds: float
    rss: int
    peak_rss: int
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""


class Meter:
    """Reads the clocks after the warm-up and after the last message.

    There are more messages in the queue than are measured, so that what a client has received ahead
    of its handler is the same at both ends.
    """

    def __init__(self, job: Job) -> None:
        self._mark = job.warmup
        self._wanted = job.messages
        self._seen = 0
        self._began: tuple[int, float, float, int] | None = None
        self.reading: Reading | None = None

    def count(self, messages: int) -> bool:
        """Count what has just been handled; return True once everything is measured."""
        self._seen += messages
        if self._seen < self._mark:
            return False
        if self.reading is not None:
            return True
        cpu, now = time.process_time(), time.perf_counter()
        if self._began is None:
            self._began = (self._seen, cpu, now, peak_rss())
            self._mark = self._seen + self._wanted
            return False
        seen, cpu_then, then, rss = self._began
        self.reading = Reading(
            messages=self._seen - seen,
            cpu=cpu - cpu_then,
            seconds=now - then,
            rss=rss,
            peak_rss=peak_rss(),
        )
        return True


def peak_rss() -> int:
    """Return the peak memory in bytes.

    Linux hands `ru_maxrss` on from the process that started this one, so it is the last resort.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def answer(reading: Reading | None, packages: Sequence[str], note: str = "") -> None:
    """Print the line with the answer."""
    if reading is None:
        sys.exit("it ended before all messages were handled")
    reading.versions = {name: version(name) for name in packages}
    reading.note = note or reading.note
    print(json.dumps(asdict(reading)), flush=True)


def compete(run: Callable[[Job, Meter], object], *packages: str) -> None:
    """Do the job of the command line. Each competitor ends with this call."""
    job = Job(**json.loads(sys.argv[1]))
    meter = Meter(job)
    run(job, meter)
    answer(meter.reading, packages)
