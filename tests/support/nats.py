"""Finds or starts the NATS server for the example of a transport.

It uses the first of these:

1. the server that ``AIO_PIKA_BATCH_TEST_NATS`` names, with JetStream enabled;
2. a private one of the ``nats-server`` installed on this machine;
3. a private one of the ``nats-server`` that this machine's package manager can install.

Without a server the tests fail: a skipped test is easily taken for one that has passed. A private
server has its own port of 127.0.0.1 and its own data, which are deleted afterwards.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn
from tests.support.packages import InstallError, install_and_find, install_commands

if TYPE_CHECKING:
    from collections.abc import Iterator

URL = "AIO_PIKA_BATCH_TEST_NATS"

_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
_START_TIMEOUT = 30  # seconds; an idle machine needs a tenth of one


class NoNatsError(Exception):
    """There is no NATS server; the message says what was tried, and what to do."""


@contextmanager
def nats(folder: Path) -> Iterator[str]:
    """Find or start a server; yield its URL."""
    if url := os.environ.get(URL):
        yield url
        return
    with _server(_installed() or _installed_now(), folder) as url:
        yield url


def _installed() -> str | None:
    return shutil.which("nats-server", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))


def _installed_now() -> str:
    commands = install_commands("nats-server", brew="nats-server")
    if commands is None:
        raise NoNatsError(
            f"""There is no NATS server to test on. Tried, in this order:
  - {URL}: not set
  - a nats-server on PATH, or in {", ".join(_PLACES)}: none
  - a package manager: no brew, and no apt-get or dnf with the right to install
Do one of these:
  - install one:   apt-get install --no-install-recommends nats-server
  - name yours:    {URL}=nats://localhost:4222"""
        )
    try:
        return install_and_find(commands, _installed, "nats-server")
    except InstallError as error:
        raise NoNatsError(str(error)) from error


@contextmanager
def _server(program: str, folder: Path) -> Iterator[str]:
    port = free_port()
    where = ["--addr", LOCALHOST, "--port", str(port)]
    log = folder / "log"
    with log.open("wb") as output:
        server = spawn([program, *where, "--jetstream", "--store_dir", str(folder)], stdout=output)
    try:
        deadline = time.monotonic() + _START_TIMEOUT
        while not _greets(port):
            if server.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-4000:]
                raise NoNatsError(f"{program} did not start:\n{said}")
            time.sleep(0.05)
        yield f"nats://{LOCALHOST}:{port}"
    finally:
        kill_group(server)


def _greets(port: int) -> bool:
    try:
        with socket.create_connection((LOCALHOST, port), timeout=1) as conversation:
            return conversation.recv(4) == b"INFO"
    except OSError:
        return False
