"""A private RabbitMQ node for a test run, with methods to kill, pause and administer it.

The node is a child process with its own home, cookie, data and ports on 127.0.0.1. It also has its
own port mapper (*epmd*), since otherwise all Erlang nodes of the machine would share one. It reads
no configuration of the system. It is stopped by SIGKILL, as its data are not needed afterwards.

All methods block. In an asynchronous test, call the slow ones in a thread::

    rabbitmq.kill()
    await asyncio.to_thread(rabbitmq.start)
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn

_START_TIMEOUT = 90  # seconds; an idle machine needs 3 to 7
_NEVER_ALARMED = "0.6"
_ALWAYS_ALARMED = "0.000001"

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_FRAME_HEADER = struct.Struct(">BHI")
_METHOD_FRAME = 1
_LARGEST_FRAME = 1 << 16
# An entry of the table of server properties: a name, `S`, and a text after its four-byte length.
_VERSION = re.compile(rb"\x07versionS\x00\x00\x00(.)", re.DOTALL)


def broker_version(host: str, port: int, *, timeout: float = 2) -> str | None:
    """Return the version in the broker's ``connection.start``, or None if no broker answers.

    A port that only accepts connections is not a broker yet.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.sendall(_PROTOCOL_HEADER)
            return _read_version(connection)
    except OSError:
        return None


def _read_version(connection: socket.socket) -> str | None:
    # Parsed here: what a test learns about a broker must not depend on the code under test.
    received = b""
    while chunk := connection.recv(4096):
        received += chunk
        if len(received) < _FRAME_HEADER.size:
            continue
        kind, _, size = _FRAME_HEADER.unpack_from(received)
        if kind != _METHOD_FRAME or size > _LARGEST_FRAME:
            break
        if len(received) > _FRAME_HEADER.size + size:
            match = _VERSION.search(received)
            return match and received[match.end() : match.end() + ord(match[1])].decode()
    return None


class Epmd:
    """The private port mapper of a node, or of the nodes of one cluster.

    Args:
        server: The start script of a RabbitMQ, whose Erlang it belongs to.
    """

    def __init__(self, server: Path) -> None:
        self.port = free_port()
        self._program = _epmd_of(server)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs already."""
        if self._process is None:
            self._process = spawn(
                [self._program, "-port", str(self.port), "-address", LOCALHOST],
                stdout=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            kill_group(self._process)
            self._process = None


class RabbitMQ:
    """One private node, which keeps its data and ports when it is killed and started again.

    Args:
        server: The start script of an installation, ``…/lib/rabbitmq/bin/rabbitmq-server``; not the
            wrapper on the PATH of some systems, which changes user.
        folder: An empty folder for all that the node writes.
        conf: Further lines of ``rabbitmq.conf``.
        plugins: Plugins to enable, such as ``rabbitmq_management``.
        name: The node's name, before ``@localhost``.
        cookie: The secret that nodes of a cluster share.
        epmd: The port mapper that nodes of a cluster share; each has its own if not given.
    """

    def __init__(
        self,
        server: Path,
        folder: Path,
        *,
        conf: Sequence[str] = (),
        plugins: Sequence[str] = (),
        name: str = "rabbit",
        cookie: str = "BATCH",
        epmd: Epmd | None = None,
    ) -> None:
        self.server = server
        self.folder = folder
        self.name = f"{name}@localhost"
        self.version = "not started"
        self.port = free_port()
        self._shared_epmd = epmd
        self._epmd = epmd or Epmd(server)
        self._erl_call = shutil.which("erl_call", path=str(Path(_epmd_of(server)).parent))
        self._process: subprocess.Popen[bytes] | None = None
        self._alarmed = False
        self._write_files(conf, plugins, cookie)
        self._environment = self._make_environment()

    @property
    def url(self) -> str:
        """Its AMQP URL, with the default user."""
        return f"amqp://guest:guest@{LOCALHOST}:{self.port}/"

    @property
    def log(self) -> str:
        """All output of the node since it was first started."""
        return self._log_file.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed since, even if it is paused."""
        return self._process is not None

    def start(self) -> None:
        """Start the node, with its data if it ran before, and wait until it answers."""
        self._epmd.start()
        with self._log_file.open("ab") as log:
            self._process = spawn(
                [str(self.server)], env=self._environment, cwd=self.folder, stdout=log
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while (version := broker_version(LOCALHOST, self.port)) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.server} did not start:\n{self.log[-4000:]}")
            time.sleep(0.1)
        self.version = version

    def kill(self) -> None:
        """Kill the node by SIGKILL, like a power failure: it flushes and closes nothing."""
        if self._process is not None:
            kill_group(self._process)
            self._process = None
            self._alarmed = False  # the alarm was set at run time

    def restart(self) -> None:
        """Kill the node and start it again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop the node by SIGSTOP. Its connections stay open, and nothing answers on them."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the node after ``pause``."""
        self._signal(signal.SIGCONT)

    def rabbitmqctl(self, *args: str, timeout: float = 60) -> str:
        """Run ``rabbitmqctl`` on this node, which takes about a second, and return its output."""
        return self._run("rabbitmqctl", args, timeout)

    def queues(self, *args: str, timeout: float = 60) -> str:
        """Run ``rabbitmq-queues``, which shows and changes replicas, and return its output."""
        return self._run("rabbitmq-queues", args, timeout)

    def _run(self, program: str, args: Sequence[str], timeout: float) -> str:
        command = [str(self.server.with_name(program)), "--node", self.name, "--quiet", *args]
        done = self._call(command, timeout)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(args)}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def eval(self, expression: str) -> str:
        """Evaluate an Erlang expression inside the node, and return its value as text."""
        if self._erl_call is None:
            return self.rabbitmqctl("eval", expression).strip()
        # Unlike `rabbitmqctl` it starts no Erlang VM, which takes seconds on a busy machine.
        done = self._call([self._erl_call, "-sname", self.name, "-e"], 60, f"{expression}\n")
        if not done.stdout.startswith("{ok, "):
            raise RuntimeError(f"{expression}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip().removeprefix("{ok, ").removesuffix("}")

    def _call(
        self, command: Sequence[str], timeout: float, given: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self._environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def close_all_connections(self, reason: str = "closed by a test") -> None:
        """Make the broker close all connections with 320 CONNECTION_FORCED."""
        self.rabbitmqctl("close_all_connections", reason)

    def set_memory_alarm(self, on: bool) -> None:
        """Raise or clear the memory alarm, which blocks connections that publish."""
        watermark = _ALWAYS_ALARMED if on else _NEVER_ALARMED
        self.eval(f"vm_memory_monitor:set_vm_memory_high_watermark({watermark}).")
        self._alarmed = on

    def restore(self) -> None:
        """Start or continue the node if needed, and clear the alarm."""
        if self._process is None:
            self.start()
            return
        self.resume()
        if self._alarmed:
            self.set_memory_alarm(False)

    def close(self) -> None:
        """Kill the node for good; the caller removes its folder."""
        self.kill()
        if self._shared_epmd is None:
            self._epmd.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        os.killpg(self._process.pid, number)

    @property
    def _log_file(self) -> Path:
        return self.folder / "node.log"

    def _write_files(self, conf: Sequence[str], plugins: Sequence[str], cookie: str) -> None:
        lines = [
            f"listeners.tcp.1 = {LOCALHOST}:{self.port}",
            "log.console = true",
            "log.file = false",
            # A nearly full disk or memory must not stop a test run.
            "disk_free_limit.absolute = 50MB",
            "total_memory_available_override_value = 2GB",
            *conf,
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        (self.folder / "plugins").write_text(f"[{','.join(plugins)}].\n")
        secret = self.folder / ".erlang.cookie"
        secret.write_text(cookie)
        secret.chmod(0o400)

    def _make_environment(self) -> dict[str, str]:
        nothing = str(self.folder / "no-such-file")
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RABBITMQ_", "ERL_", "ERLANG_"))
        }
        return inherited | {
            "HOME": str(self.folder),
            "PATH": os.pathsep.join([*_erlang_of(self.server), os.environ["PATH"]]),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._epmd.port),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": LOCALHOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": nothing,
            "RABBITMQ_ADVANCED_CONFIG_FILE": nothing,
            "RABBITMQ_CONFIG_FILES": nothing,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ("-kernel inet_dist_use_interface {127,0,0,1}"),
            # The script then becomes the Erlang VM instead of waiting for one.
            "RUNNING_UNDER_SYSTEMD": "true",
        }


def _erlang_of(server: Path) -> list[str]:
    """Return the folder of the Erlang unpacked beside *server*, if there is one."""
    erlang = server.parents[2] / "erlang" / "bin"
    return [str(erlang)] if (erlang / "erl").exists() else []


def _epmd_of(server: Path) -> str:
    beside = sorted(server.parents[2].glob("erlang/erts-*/bin/epmd"))
    found = str(beside[-1]) if beside else shutil.which("epmd")
    if found is None:
        raise RuntimeError(f"no epmd beside {server}, and none on PATH")
    return found
