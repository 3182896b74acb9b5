"""Finds or starts the PostgreSQL for tests.

It uses the first of these:

1. the server that ``AIO_PIKA_BATCH_TEST_POSTGRES`` names;
2. a private server of the programs installed on this machine;
3. a private server of those that this machine's package manager can install.

Without a server the tests fail: a skipped test is easily taken for one that has passed.

A private server has its own port of 127.0.0.1 and its own data, which are deleted afterwards.
PostgreSQL refuses to run as root, so root runs it as the user that its package has created.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
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

URL = "AIO_PIKA_BATCH_TEST_POSTGRES"

_USER = "postgres"
_PATTERNS = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql*/bin",
    "usr/local/opt/postgresql*/bin",
)
_SHARED_FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108  -- the folder made there has its own name
_START_TIMEOUT = 60  # seconds; an idle machine needs one
_ATTEMPTS = 20


class NoPostgresError(Exception):
    """There is no PostgreSQL; the message says what was tried, and what to do."""


@contextmanager
def postgres() -> Iterator[str]:
    """Find or start a server; yield its URL."""
    if url := os.environ.get(URL):
        yield url
        return
    with private_postgres() as server:
        yield server.url


@contextmanager
def private_postgres() -> Iterator[PostgresServer]:
    """Start a server that a test may kill."""
    programs = installed() or _installed_now()
    with _data_folder() as folder, _server(programs, folder) as server:
        yield server


def installed() -> Path | None:
    """Return the folder of the newest PostgreSQL programs on this machine."""
    found = [
        folder
        for pattern in _PATTERNS
        for folder in Path("/").glob(pattern)
        if (folder / "initdb").exists()
    ]
    if found:
        return max(
            found, key=lambda folder: [int(each) for each in re.findall(r"\d+", str(folder))]
        )
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _installed_now() -> Path:
    commands = install_commands("postgresql", brew="postgresql", dnf="postgresql-server")
    if commands is None:
        raise NoPostgresError(
            f"""There is no PostgreSQL to test on. Tried, in this order:
  - {URL}: not set
  - initdb on PATH, and in {", ".join(f"/{pattern}" for pattern in _PATTERNS)}: none
  - a package manager: no brew, and no apt-get or dnf with the right to install
Do one of these:
  - install one:   apt-get install --no-install-recommends postgresql
  - name yours:    {URL}=postgresql://postgres@localhost/postgres"""
        )
    try:
        return install_and_find(commands, installed, "initdb")
    except InstallError as error:
        raise NoPostgresError(str(error)) from error


@contextmanager
def _data_folder() -> Iterator[Path]:
    """Create a folder that the server's user can reach, and delete it afterwards.

    Not below pytest's own folder, and not always in `TMPDIR`: that may be in a checkout that only
    root may enter.
    """
    for parent in (None, *_SHARED_FOLDERS):
        if parent is not None and not Path(parent).is_dir():
            continue
        folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=parent))
        try:
            if os.geteuid() == 0:
                user = pwd.getpwnam(_USER)
                os.chown(folder, user.pw_uid, user.pw_gid)
            can_write = ["test", "-w", str(folder)]
            if subprocess.run([*_as_user(), *can_write], cwd="/", check=False).returncode == 0:
                yield folder
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise NoPostgresError(
        f"The user {_USER} can't reach any of {tempfile.gettempdir()}, {', '.join(_SHARED_FOLDERS)}"
        f"; set {URL}, or TMPDIR to a folder that every user can reach"
    )


def _as_user() -> list[str]:
    """Return the prefix that runs a command as the server's user."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(_USER)
    who = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    # A change of user clears the parent-death signal; setpriv sets it again.
    return ["setpriv", *who, "--pdeathsig=KILL"]


class PostgresServer:
    """A private server, which can be killed and started again with its data.

    Attributes:
        url: Its URL, while it runs.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._as_user = _as_user()
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://{_USER}@{LOCALHOST}:{self._port}/postgres"
        # Not the user's locale: it may not be installed.
        how = ["-U", _USER, "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8"]
        initdb = [str(programs / "initdb"), "-D", str(folder / "data"), *how]
        _run([*self._as_user, *initdb], folder)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {
            "listen_addresses": LOCALHOST,
            "port": self._port,
            "unix_socket_directories": "",
            "fsync": "off",
        }
        command = [*self._as_user, str(self._programs / "postgres"), "-D"]
        command += [str(self._folder / "data")]
        command += [each for name, value in options.items() for each in ("-c", f"{name}={value}")]
        log = self._folder / "log"
        deadline = time.monotonic() + _START_TIMEOUT
        attempts = 0
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                # After a kill its children may still hold the shared memory for a moment.
                attempts += 1
                with log.open("ab") as output:
                    self._process = spawn(command, cwd=self._folder, stdout=output)
            if time.monotonic() > deadline or attempts > _ATTEMPTS:
                said = log.read_text(errors="replace")[-4000:]
                raise NoPostgresError(f"{self._programs}/postgres did not start:\n{said}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        ready = [str(self._programs / "pg_isready"), "-q", "-h", LOCALHOST, "-p", str(self._port)]
        return subprocess.run(ready, check=False).returncode == 0

    def kill(self) -> None:
        """Kill it by SIGKILL: its sessions end in the middle of whatever they do."""
        if self._process is not None:
            kill_group(self._process)
            self._process = None

    def stop(self) -> None:
        """End it at once, but let it take its children along: they have sessions of their own."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                kill_group(self._process)
            self._process = None


@contextmanager
def _server(programs: Path, folder: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(programs, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoPostgresError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")
