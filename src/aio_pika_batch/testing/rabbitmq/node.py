"""How is a real RabbitMQ had for one test run, and hurt, without touching any other?

A node here is a child process with everything of its own: home, cookie, data, ports on 127.0.0.1,
and the port mapper (*epmd*) that Erlang nodes find each other by, which would otherwise be a daemon
shared by the whole machine. Nothing of the system's configuration is read. There is nothing worth
saving, so the end is SIGKILL.

All methods block. In an asynchronous test call the slow ones in a thread::

    rabbitmq.kill()
    await asyncio.to_thread(rabbitmq.start)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

from aio_pika_batch.testing.rabbitmq.ports import LOCALHOST, free_port, greeting
from aio_pika_batch.testing.rabbitmq.tether import kill_group, spawn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_START_TIMEOUT = 90  # seconds; an idle machine needs 3 to 7
_NEVER_ALARMED = "0.6"
_ALWAYS_ALARMED = "0.000001"


class Epmd:
    """The private port mapper of a node, or of the nodes of one cluster."""

    def __init__(self, program: str) -> None:
        self.port = free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, server: Path) -> Self:
        """Return the one that the Erlang of a RabbitMQ brings, by that one's start script."""
        return cls(_epmd_of(server))

    def start(self) -> None:
        """Start it, unless it runs."""
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
    """One private node, which keeps its data and its ports however often it is killed.

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
        self._epmd = epmd or Epmd.of(server)
        self._process: subprocess.Popen[bytes] | None = None
        self._alarmed = False
        self._write_files(conf, plugins, cookie)
        self._environment = self._make_environment()

    @property
    def url(self) -> str:
        """Where it listens, with the user that every fresh broker knows."""
        return f"amqp://guest:guest@{LOCALHOST}:{self.port}/"

    @property
    def log(self) -> str:
        """All that the node has printed, over all its lives."""
        return self._log_file.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed since; paused or not."""
        return self._process is not None

    def start(self) -> None:
        """Start the node, on the data of its last life if it had one, and wait for its greeting."""
        self._epmd.start()
        with self._log_file.open("ab") as log:
            self._process = spawn(
                [str(self.server)], env=self._environment, cwd=self.folder, stdout=log
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while (version := greeting(LOCALHOST, self.port)) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.server} did not start:\n{self.log[-4000:]}")
            time.sleep(0.1)
        self.version = version

    def kill(self) -> None:
        """End the node as a power cut would: SIGKILL, nothing flushed, nobody told."""
        if self._process is not None:
            kill_group(self._process)
            self._process = None
            self._alarmed = False  # a node forgets what it was told at run time

    def restart(self) -> None:
        """Kill the node and start it again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop the node's time. Its connections stay open, and nothing answers on them."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after ``pause``."""
        self._signal(signal.SIGCONT)

    def rabbitmqctl(self, *args: str, timeout: float = 60) -> str:
        """Run ``rabbitmqctl`` against this node, about a second a call, and return its output."""
        return self._run("rabbitmqctl", args, timeout)

    def queues(self, *args: str, timeout: float = 60) -> str:
        """Run ``rabbitmq-queues``, which knows about replicas, in the same way."""
        return self._run("rabbitmq-queues", args, timeout)

    def _run(self, program: str, args: Sequence[str], timeout: float) -> str:
        done = subprocess.run(
            [str(self.server.with_name(program)), "--node", self.name, "--quiet", *args],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(args)}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def eval(self, expression: str) -> str:
        """Evaluate an Erlang expression inside the node."""
        return self.rabbitmqctl("eval", expression).strip()

    def close_all_connections(self, reason: str = "closed by a test") -> None:
        """Let the broker close every connection in good order, with 320 CONNECTION_FORCED."""
        self.rabbitmqctl("close_all_connections", reason)

    def set_memory_alarm(self, on: bool) -> None:
        """Raise the memory alarm, under which connections that publish are blocked, or end it."""
        self.rabbitmqctl("set_vm_memory_high_watermark", _ALWAYS_ALARMED if on else _NEVER_ALARMED)
        self._alarmed = on

    def restore(self) -> None:
        """Undo what was done to the node: it runs, its time passes, and no alarm is raised."""
        if self._process is None:
            self.start()
            return
        self.resume()
        if self._alarmed:
            self.set_memory_alarm(False)

    def close(self) -> None:
        """Kill the node for good. Its folder is left to whoever made it."""
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
            # A test run must not stop because the machine is nearly full, or seems to be.
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
    """Return the folder of the Erlang unpacked beside *server*, if that brought one of its own."""
    erlang = server.parents[2] / "erlang" / "bin"
    return [str(erlang)] if (erlang / "erl").exists() else []


def _epmd_of(server: Path) -> str:
    beside = sorted(server.parents[2].glob("erlang/erts-*/bin/epmd"))
    found = str(beside[-1]) if beside else shutil.which("epmd")
    if found is None:
        raise RuntimeError(f"no epmd beside {server}, and none on PATH")
    return found
