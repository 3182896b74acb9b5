"""How does a child process die with the test run that started it, even one that is killed?

On Linux by a parent-death signal. The kernel sends it when the *thread* that forked the child ends,
so all children are started by one thread that lives as long as the interpreter. Other systems have
no such signal; there a child is stopped by the fixture that started it, and by nothing else.

The signal is asked for by this file itself, run as a small program that then becomes the child:
a ``preexec_fn`` would run Python between fork and exec of a process that has threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forker")


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = subprocess.STDOUT,
) -> subprocess.Popen[bytes]:
    """Start *command* in a session of its own, tied to the life of this process.

    Its process id is its process group's too, so that ``kill_group`` reaches all it started.
    """
    tied = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
    return _forker.submit(
        subprocess.Popen,
        tied,
        env=None if env is None else dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    ).result()


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill *child* and everything in its process group, and wait until it is gone."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _become(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the signal was asked for
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606  # no shell is the point


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
