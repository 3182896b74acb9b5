"""Which RabbitMQ does a test run on?

The first of these that there is:

1. the one that `AIO_PIKA_BATCH_TEST_URL` names;
2. a private node of the `rabbitmq-server` that `AIO_PIKA_BATCH_TEST_SERVER` names;
3. a private node of the `rabbitmq-server` installed on this machine;
4. a container, where a Docker daemon answers and testcontainers is installed.

What was asked for by name is used or the run fails. Nothing is installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from aio_pika_batch.testing.rabbitmq.ports import greeting

URL = "AIO_PIKA_BATCH_TEST_URL"
SERVER = "AIO_PIKA_BATCH_TEST_SERVER"

_IMAGE = "rabbitmq:4"
_AMQP = 5672
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
# Debian's and Fedora's own command changes user; the script that it calls does not.
_UNWRAPPED = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

TRIED = f"""  - {URL} and {SERVER}: not set
  - a rabbitmq-server on PATH, in {", ".join(_PLACES)} or {_UNWRAPPED.parent}: none
  - Docker: no daemon answers, or there is no testcontainers"""

HELP = f"""Any of these will do:
  - install one:   apt-get install --no-install-recommends rabbitmq-server
  - name yours:    {URL}=amqp://guest:guest@localhost:5672/
  - start Docker   (and pip install "testcontainers[rabbitmq]")"""


class NoBrokerError(Exception):
    """No broker could be had; the message says what was tried, and what would help."""


@dataclass(frozen=True)
class Broker:
    """A broker that answers.

    Attributes:
        url: Where it is.
        version: What it calls itself, such as ``"4.0.5"``.
        node: How to kill, pause and administer it, if the tests have started it themselves.
    """

    url: str
    version: str
    node: RabbitMQ | None = None


@dataclass(frozen=True)
class Way:
    """A way to a broker, which costs nothing before it is taken.

    Attributes:
        how: The way in words, for the head of the report.
        has_node: Whether the broker will be a node of our own, which tests may kill.
        take: Starts the broker, given a folder for what it writes.
    """

    how: str
    has_node: bool
    take: Callable[[Path], AbstractContextManager[Broker]]


def choose() -> Way:
    """Return the best way to a broker.

    Raises:
        NoBrokerError: There is none.
    """
    way = on_this_machine() or by_docker()
    if way is None:
        raise NoBrokerError(
            f"There is no RabbitMQ to test on. Tried, in this order:\n{TRIED}\n{HELP}"
        )
    return way


def on_this_machine() -> Way | None:
    """Return the way to a broker that is named, or else to one that is installed."""
    if url := os.environ.get(URL):
        return Way(f"the broker that {URL} names", False, lambda _: _named(url))
    if named := os.environ.get(SERVER):
        return Way(f"a private node of {named}", True, lambda folder: node(Path(named), folder))
    if server := installed():
        return Way(f"a private node of {server}", True, lambda folder: node(server, folder))
    return None


def by_docker() -> Way | None:
    """Return the way to a container."""
    if not _docker_answers():
        return None
    return Way(f"a container of {_IMAGE}", False, lambda _: _container())


def installed() -> Path | None:
    """Return the start script of the RabbitMQ installed on this machine."""
    if _UNWRAPPED.exists():
        return _UNWRAPPED
    path = os.pathsep.join([os.environ.get("PATH", ""), *_PLACES])
    found = shutil.which("rabbitmq-server", path=path)
    return Path(found).resolve() if found else None


@contextmanager
def _named(url: str) -> Iterator[Broker]:
    parts = urlsplit(url)
    if parts.scheme != "amqp":
        raise NoBrokerError(f"{URL} must be an amqp:// URL, and is {parts.scheme}://")
    version = greeting(parts.hostname or "localhost", parts.port or _AMQP)
    if version is None:
        raise NoBrokerError(f"{URL} is set, but no broker answers at {parts.hostname}:{parts.port}")
    yield Broker(url, version)


@contextmanager
def node(server: Path, folder: Path) -> Iterator[Broker]:
    """Run a private node, until the context is left."""
    with RabbitMQ(server, folder) as running:
        yield Broker(running.url, running.version, running)


@contextmanager
def _container() -> Iterator[Broker]:
    from testcontainers.community.rabbitmq import RabbitMqContainer

    with RabbitMqContainer(_IMAGE) as container:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(_AMQP))
        version = greeting(host, port)
        if version is None:
            raise NoBrokerError(f"the container of {_IMAGE} runs, but no broker answers in it")
        yield Broker(f"amqp://guest:guest@{host}:{port}/", version)


def _docker_answers() -> bool:
    """Tell whether a daemon is there: a ``docker`` command on PATH would prove nothing."""
    if find_spec("docker") is None or find_spec("testcontainers") is None:
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
