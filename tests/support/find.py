"""Finds or starts the RabbitMQ of the integration tests.

It uses the first of these: a broker that is named or installed, or a container, as for users' tests
(`aio_pika_batch.testing.rabbitmq.find`); then a private node of the ``rabbitmq-server`` that this
machine's package manager can install.

If ``CI`` is set, the last two change places: a build machine may install packages, and only a
private node can run the tests that kill or administer it.

If there is no broker, the tests fail: skipped tests are easily taken for ones that passed.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.testing.rabbitmq import find as shipped
from aio_pika_batch.testing.rabbitmq.find import (
    SERVER,
    URL,
    BrokerSource,
    NoBrokerError,
    RunningBroker,
)
from tests.support.packages import InstallError, install_and_find, install_commands

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SERVER", "URL", "BrokerSource", "NoBrokerError", "RunningBroker", "choose"]


def choose() -> BrokerSource:
    """Return the first source of a broker that can be used; raise ``NoBrokerError`` without one."""
    if source := shipped.local_source():
        return source
    last_resorts = [shipped.docker_source, _package_source]
    if os.environ.get("CI"):
        last_resorts.reverse()
    for resort in last_resorts:
        if source := resort():
            return source
    raise NoBrokerError(
        f"""There is no RabbitMQ to test on. Tried, in this order:
{shipped.TRIED}
  - a package manager: no brew, and no apt-get or dnf with the right to install
{shipped.HELP}"""
    )


def _package_source() -> BrokerSource | None:
    commands = _install_commands()
    if commands is None:
        return None
    last = " ".join(commands[-1])
    return BrokerSource(
        f"a private node, after `{last}`", True, lambda folder: _install(commands, folder)
    )


@contextmanager
def _install(commands: list[list[str]], folder: Path) -> Iterator[RunningBroker]:
    try:
        server = install_and_find(commands, shipped.installed, "rabbitmq-server")
    except InstallError as error:
        raise NoBrokerError(str(error)) from error
    with shipped.node(server, folder) as broker:
        yield broker


def _install_commands() -> list[list[str]] | None:
    return install_commands("rabbitmq-server", brew="rabbitmq")
