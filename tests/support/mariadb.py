"""Finds or starts a MariaDB for the tests, or installs one.

The first of these that there is:

1. the one that ``AIO_PIKA_BATCH_TEST_MARIADB`` names, as a URL of SQLAlchemy's; MySQL 8 will do;
2. a private server of the programs installed on this machine;
3. a private server of those that this machine's package manager can install.

There is no "none": a test that is skipped looks just like one that passed. A private server has its
own port of 127.0.0.1 and its own data, which are deleted afterwards.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn
from tests.support.packages import InstallError, install_and_find, install_commands

if TYPE_CHECKING:
    from collections.abc import Iterator

URL = "AIO_PIKA_BATCH_TEST_MARIADB"

_USER = "mysql"
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
_START_TIMEOUT = 60  # seconds; an idle machine needs two


class NoMariadbError(Exception):
    """No MariaDB could be had; the message says what was tried, and what would help."""


@contextmanager
def mariadb() -> Iterator[str]:
    """Find or start one; gives its URL, with a database."""
    if url := os.environ.get(URL):
        yield url
        return
    program = _installed() or _installed_now()
    # Not below pytest's own folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    try:
        with _server(program, folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _installed() -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *_PLACES])
    return shutil.which("mariadbd", path=path)


def _installed_now() -> str:
    commands = install_commands("mariadb-server", brew="mariadb")
    if commands is None:
        raise NoMariadbError(
            f"""There is no MariaDB to test on. Tried, in this order:
  - {URL}: not set
  - a mariadbd on PATH, or in {", ".join(_PLACES)}: none
  - a package manager: no brew, and no apt-get or dnf with the right to install
Do one of these:
  - install one:   apt-get install --no-install-recommends mariadb-server
  - name yours:    {URL}=mysql+asyncmy://root@localhost/test"""
        )
    try:
        return install_and_find(commands, _installed, "mariadbd")
    except InstallError as error:
        raise NoMariadbError(str(error)) from error


@contextmanager
def _server(program: str, folder: Path) -> Iterator[str]:
    as_user: list[str] = []
    if os.geteuid() == 0:
        user = pwd.getpwnam(_USER)
        os.chown(folder, user.pw_uid, user.pw_gid)
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        # A change of user clears the parent-death signal; it is set again.
        as_user = ["setpriv", *ids, "--pdeathsig=KILL"]
    data, log, port = folder / "data", folder / "log", free_port()
    install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db"]
    _run([*as_user, *install, "--auth-root-authentication-method=normal"], folder)
    options = {
        "datadir": data,
        "bind-address": LOCALHOST,
        "port": port,
        "socket": folder / "socket",
        "pid-file": folder / "pid",
        "innodb-flush-log-at-trx-commit": 0,
    }
    command = [*as_user, program, "--no-defaults"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with log.open("wb") as output:
        server = spawn(command, cwd=folder, stdout=output)
    try:
        deadline = time.monotonic() + _START_TIMEOUT
        while not _greets(port):
            if server.poll() is not None or time.monotonic() > deadline:
                output_end = log.read_text(errors="replace")[-4000:]
                raise NoMariadbError(f"{program} did not start:\n{output_end}")
            time.sleep(0.05)
        create = ["-e", "CREATE DATABASE test CHARACTER SET utf8mb4"]
        client = ["mariadb", "--no-defaults", "-u", "root", "-h", LOCALHOST, "-P", str(port)]
        _run([*client, *create], folder)
        yield f"mysql+asyncmy://root@{LOCALHOST}:{port}/test"
    finally:
        kill_group(server)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoMariadbError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")


def _greets(port: int) -> bool:
    try:
        with socket.create_connection((LOCALHOST, port), timeout=1) as line:
            return bool(line.recv(1))
    except OSError:
        return False
