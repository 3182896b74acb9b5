"""Does one measurement: fills a queue, runs a process with a time limit, and checks its work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.fill import Filler
from benchmarks.protocol import Job, Reading

_SETTLE = 0.3  # seconds, for a broker to have done with what came before
_RETURN = 3.0  # seconds, for it to take back what a connection left unsettled


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a table.

    Attributes:
        key: Its name in code and for ``--only``.
        name: Its name in the report.
        module: The competitor, in ``benchmarks.competitors``.
        is_ours: Whether it is this library.
        fill: Whether it consumes, so that its queue is filled first.
        shape: Of the messages that it consumes.
        queue_type: Of the queue that it consumes.
        source: The sources of this library to use; None for the installed ones.
        limit: The maximum number of seconds it may take.
    """

    key: str
    name: str
    module: str
    task: str
    messages: int
    environment: str = environments.MAIN
    is_ours: bool = False
    fill: bool = True
    shape: str = "plain"
    body: int = 256
    batch: int = 100
    prefetch: int = 500
    warmup: int = 1000
    options: dict[str, Any] = field(default_factory=dict)
    queue_type: str = "classic"
    source: Path | None = None
    limit: float = 300.0

    def smaller(self, most: int) -> Case:
        """Return the same case with fewer messages."""
        messages = min(self.messages, most)
        return replace(self, messages=messages, warmup=min(self.warmup, messages))

    @property
    def ahead(self) -> int:
        """How many messages the client may have received ahead at the end."""
        return self.prefetch * int(self.options.get("num_workers", 1)) + self.batch

    @property
    def filled(self) -> int:
        """How many messages its queue has at the start: it never gets empty."""
        return self.warmup + self.messages + 2 * self.ahead if self.fill else 0


class Failed(Exception):
    """A competitor has failed; the message says why."""


def measure(case: Case, filler: Filler, url: str, missing: Mapping[str, str]) -> Reading:
    """Measure once.

    Args:
        missing: The environments that could not be made, and why.

    Raises:
        Failed: It ended with an error, took too long, or has not done what it reports.
    """
    if case.environment in missing:
        raise Failed(missing[case.environment])
    queue = f"bench.{case.key}"
    filler.delete(queue)
    filler.make(queue, case.queue_type)
    try:
        if case.fill:
            filler.fill(queue, case.filled, case.body, case.shape)
        time.sleep(_SETTLE)  # noqa: TID251  -- no event loop here
        job = Job(
            url=url,
            queue=queue,
            task=case.task,
            messages=case.messages,
            warmup=case.warmup,
            batch=case.batch,
            prefetch=case.prefetch,
            body=case.body,
            options=case.options,
        )
        reading = run(case, job)
        _check(case, reading, queue, filler)
        return reading
    finally:
        for each in (queue, f"{queue}.idle"):
            filler.delete(each)


def run(case: Case, job: Job) -> Reading:
    """Run the competitor in a process of its own, and return its answer."""
    interpreter = environments.python(case.environment)
    command = [str(interpreter), "-m", f"benchmarks.competitors.{case.module}"]
    paths = [str(each) for each in (case.source, environments.ROOT) if each is not None]
    process = subprocess.Popen(  # noqa: S603  -- our own
        [*command, json.dumps(asdict(job))],
        cwd=environments.ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, complaints = process.communicate(timeout=case.limit)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"not done after {case.limit:.0f} s") from late
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        # What the interpreter says on its way out is not what went wrong.
        first = complaints.partition("Exception ignored in")[0]
        said = [line for line in first.splitlines() if line.strip()]
        raise Failed(said[-1] if said else f"ended with {process.returncode}, without a word")
    return Reading(**json.loads(lines[-1]))


def _check(case: Case, reading: Reading, queue: str, filler: Filler) -> None:
    """Check the queue: the settlements, or the publications, must have arrived."""
    if not case.fill:
        if (length := filler.length(queue)) < reading.messages:
            raise Failed(f"{length} messages in the queue, {reading.messages} reported")
        return
    handled = case.warmup + reading.messages
    lost = {"mixed": 0.9, "requeue": 0.0}.get(case.task, 1.0) * handled
    # What is kept is not less than what was not touched; what was acked is not there any more.
    at_least = case.filled - round(lost) - case.ahead
    left = filler.wait(queue, at_least, _RETURN)
    most = case.filled - round(lost) + case.ahead
    if not at_least - case.ahead <= left <= most:
        raise Failed(f"{left} messages left in the queue, expected {at_least} to {most}")
