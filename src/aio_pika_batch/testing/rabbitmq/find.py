"""Finds or starts a RabbitMQ for tests.

It uses the first of these:

1. the broker that `AIO_PIKA_BATCH_TEST_URL` names;
2. a private node of the `rabbitmq-server` that `AIO_PIKA_BATCH_TEST_SERVER` names;
3. a private node of the `rabbitmq-server` installed on this machine;
4. a container, if a Docker daemon answers and testcontainers is installed.

A broker that is named must be usable, or the run fails. Nothing is ever installed.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from aio_pika_batch.testing.rabbitmq.node import RabbitMQ, broker_version

URL = "AIO_PIKA_BATCH_TEST_URL"
SERVER = "AIO_PIKA_BATCH_TEST_SERVER"

_IMAGE = "rabbitmq:4"
_AMQP_PORT = 5672
_DOCKER_SOCKET = "unix:///var/run/docker.sock"
_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
# Debian's and Fedora's command on the PATH changes user; the script that it calls does not.
_UNWRAPPED = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

TRIED = f"""  - {URL} and {SERVER}: not set
  - a rabbitmq-server on PATH, in {", ".join(_FOLDERS)} or {_UNWRAPPED.parent}: none
  - Docker: no daemon answers, or testcontainers is not installed"""

HELP = f"""Do one of these:
  - install one:   apt-get install --no-install-recommends rabbitmq-server
  - name yours:    {URL}=amqp://guest:guest@localhost:5672/
  - start Docker   (and pip install "testcontainers[rabbitmq]")"""


class NoBrokerError(Exception):
    """There is no broker to test on; the message lists what was tried and what to do."""


@dataclass(frozen=True)
class RunningBroker:
    """A broker that answers.

    Attributes:
        url: Its AMQP URL.
        version: Its version, such as ``"4.0.5"``.
        node: Kills, pauses and administers it; None if the tests have not started it.
    """

    url: str
    version: str
    node: RabbitMQ | None = None


@dataclass(frozen=True)
class BrokerSource:
    """A way to get a broker, which does nothing before `start`.

    Attributes:
        description: What it is, for the head of the report.
        has_node: Whether the broker is a private node, which tests may kill.
        start: Starts the broker, given a folder for what it writes.
    """

    description: str
    has_node: bool
    start: Callable[[Path], AbstractContextManager[RunningBroker]]


def choose() -> BrokerSource:
    """Return the first source of a broker that can be used.

    Raises:
        NoBrokerError: There is none.
    """
    source = local_source() or docker_source()
    if source is None:
        raise NoBrokerError(
            f"There is no RabbitMQ to test on. Tried, in this order:\n{TRIED}\n{HELP}"
        )
    return source


def local_source() -> BrokerSource | None:
    """Return the broker that is named, or a node of the server that is named or installed."""
    if url := os.environ.get(URL):
        return BrokerSource(f"the broker that {URL} names", False, lambda _: _named(url))
    if server := os.environ.get(SERVER) or installed():
        script = Path(server)
        return BrokerSource(f"a private node of {script}", True, lambda to: node(script, to))
    return None


def docker_source() -> BrokerSource | None:
    """Return a container, if Docker can be used."""
    if not _docker_answers():
        return None
    return BrokerSource(f"a container of {_IMAGE}", False, lambda _: _container())


def installed() -> Path | None:
    """Return the start script of the RabbitMQ installed on this machine."""
    if _UNWRAPPED.exists():
        return _UNWRAPPED
    path = os.pathsep.join([os.environ.get("PATH", ""), *_FOLDERS])
    found = shutil.which("rabbitmq-server", path=path)
    return Path(found).resolve() if found else None


@contextmanager
def _named(url: str) -> Iterator[RunningBroker]:
    parts = urlsplit(url)
    if parts.scheme != "amqp":
        raise NoBrokerError(f"{URL} must be an amqp:// URL, and is {parts.scheme}://")
    version = broker_version(parts.hostname or "localhost", parts.port or _AMQP_PORT)
    if version is None:
        raise NoBrokerError(f"{URL} is set, but no broker answers at {parts.hostname}:{parts.port}")
    yield RunningBroker(url, version)


@contextmanager
def node(server: Path, folder: Path) -> Iterator[RunningBroker]:
    """Run a private node while the context is open."""
    with RabbitMQ(server, folder) as running:
        yield RunningBroker(running.url, running.version, running)


@contextmanager
def _container() -> Iterator[RunningBroker]:
    from testcontainers.community.rabbitmq import RabbitMqContainer

    with RabbitMqContainer(_IMAGE) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(_AMQP_PORT))
        version = broker_version(host, port)
        if version is None:
            raise NoBrokerError(f"the container of {_IMAGE} runs, but no broker answers in it")
        yield RunningBroker(f"amqp://guest:guest@{host}:{port}/", version)


def _docker_answers() -> bool:
    """Ask the daemon: a ``docker`` command on PATH proves nothing."""
    if find_spec("docker") is None or find_spec("testcontainers") is None:
        return False
    host = os.environ.get("DOCKER_HOST") or _DOCKER_SOCKET
    # The client leaks its socket where no broker listens, and the garbage collector would then warn
    # in the middle of a test, whichever that is.
    if host.startswith("unix://") and not _listens(host.removeprefix("unix://")):
        return False
    import docker

    try:
        client = docker.from_env(timeout=2)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except Exception:  # noqa: BLE001  -- whatever went wrong, there is no Docker to be used
        return False


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
