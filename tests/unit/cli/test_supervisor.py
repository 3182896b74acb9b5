"""Tests of what the supervisor does about starts that fail, its own pauses, and orphans."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from aio_pika_batch.cli import supervisor as supervisors
from aio_pika_batch.cli.process_manager import Heartbeat, ProcessManager, ProcessPolicy
from aio_pika_batch.cli.supervisor import ProcessMetrics, Supervisor
from aio_pika_batch.cli.worker_process import ProcessOptions
from aio_pika_batch.runtime.shutdown import SIGNALS
from tests.unit.cli.test_process_manager import started


def supervise(**policy: object) -> Supervisor:
    """Return a supervisor that runs nothing yet."""
    return Supervisor(ProcessManager(ProcessPolicy(1, **policy)), ProcessOptions(targets=("a:b",)))


def open_files() -> int:
    """Return how many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "too many"), OSError(errno.ENOMEM, "no"), RuntimeError("no thread")],
    ids=["descriptors", "memory", "threads"],
)
async def test_a_start_that_fails_never_ends_the_supervisor(monkeypatch, error):
    """Each is tried again, and a signal still ends it."""
    tries = []

    async def start(*_, **__):
        tries.append(asyncio.get_running_loop().time())
        raise error

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(supervisors.time, "monotonic", loop.time)
    monkeypatch.setattr(loop, "add_signal_handler", lambda *_: None)
    monkeypatch.setattr(loop, "remove_signal_handler", lambda *_: None)
    supervisor = supervise()
    descriptors = open_files()
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(60)
    assert [0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5] == pytest.approx(tries)
    assert descriptors == open_files(), "its sockets are closed"
    supervisor._on_stop_signal()
    assert 0 == await running


def test_a_process_starts_with_its_signals_blocked():
    """A signal to the whole group can't end a process that still imports."""
    with supervisors._signals_blocked():
        shown = subprocess.run(
            [
                sys.executable,
                "-c",
                "import signal; print(*map(int, signal.pthread_sigmask(0, ())))",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert {int(each) for each in SIGNALS} <= set(map(int, shown.split()))
    assert set() == signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)


def test_the_current_folder_is_not_on_the_path_of_a_process():
    """And the interpreter's own options are passed on."""
    program = (
        "from aio_pika_batch.cli.supervisor import _interpreter_options;"
        "print(*_interpreter_options())"
    )
    shown = subprocess.run(
        [sys.executable, "-O", "-X", "dev", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert ("-O" in shown, "dev" in shown, shown.count("-P")) == (True, True, 1)


def test_without_a_writable_folder_processes_run_without_metrics(monkeypatch, caplog):
    """As on a read-only file system; one line says so."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    options = ProcessOptions(targets=("a:b",), has_metrics=True)
    supervisor = Supervisor(ProcessManager(ProcessPolicy(1)), options)
    supervisor._share_metrics(AsyncExitStack())
    assert not supervisor._options.has_metrics
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    [line] = caplog.messages
    assert line.startswith("no folder for metrics; running without those of the processes")


def test_orphans_are_reaped_and_own_processes_are_left_alone():
    """The code that started a process waits for it."""
    supervisor = supervise()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    supervisor._reap_orphans()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_processes_are_counted():
    """Also those that never came up."""
    manager = started(3, hung_after=10)
    manager.on_exit(0, -9, 1)
    manager.poll(1.5)
    manager.on_heartbeat(1, Heartbeat(True, False, 1), 5)
    manager.poll(10)
    registry = CollectorRegistry()
    registry.register(ProcessMetrics(manager))
    shown = dict(
        line.split() for line in generate_latest(registry).decode().splitlines() if line[0] != "#"
    )
    assert {
        "aio_pika_batch_process_restarts_total": "1.0",
        "aio_pika_batch_process_crashes_total": "1.0",
        "aio_pika_batch_process_hung_kills_total": "1.0",
        "aio_pika_batch_processes_wanted": "3.0",
        "aio_pika_batch_processes_running": "3.0",
    } == shown
