"""Child processes that die with the test run that started them, and free ports for them.

On Linux the kernel kills a child by a parent-death signal, even if the test run itself is killed.
On other systems a child ends only when the fixture that started it stops it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

LOCALHOST = "127.0.0.1"

# The kernel sends the parent-death signal when the thread that forked the child ends. So one thread
# starts all children, and lives as long as the interpreter.
_forker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forker")


# Below the range of ports for outgoing connections: a node that was killed must find its port free
# when it starts again.
_PORTS = range(20_000, 32_000)
_BLOCK = 100


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens.

    While this process runs, no other one gets the port from this function, and this one gets it
    again only after all others. So nothing takes it before its server listens, or while that server
    is stopped.
    """
    while True:
        with _drawing:
            port = next(_own_ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if _binds(probe, port):
                return port


def _draw_ports() -> Iterator[int]:
    """Yield ports from blocks that this process has claimed, forever.

    A process claims a block by binding its first port. The kernel ends the claim with the process.
    """
    blocks = list(_PORTS[::_BLOCK])
    random.shuffle(blocks)
    claimed: set[int] = set()
    while True:
        for first in blocks:
            if first not in claimed:
                claim = socket.socket()
                if not _binds(claim, first):
                    claim.close()
                    continue
                claim.detach()  # so that nothing closes it before the process ends
                claimed.add(first)
            yield from range(first + 1, first + _BLOCK)


def _binds(unbound: socket.socket, port: int) -> bool:
    """Bind a socket, and return whether that was possible."""
    try:
        unbound.bind((LOCALHOST, port))
    except OSError:
        return False
    return True


_own_ports = _draw_ports()
_drawing = threading.Lock()


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = subprocess.STDOUT,
) -> subprocess.Popen[bytes]:
    """Start *command* in a new session, tied to the life of this process.

    Its process id is also the id of its process group, which `kill_group` kills.
    """
    # This file, run as a program, asks for the signal and then becomes the command. A preexec_fn
    # would run Python between fork and exec of a process that has threads.
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
    """Kill *child* and its whole process group, and wait until it has ended."""
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
