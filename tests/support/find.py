"""Which broker do the integration tests run on?

The first of these that there is: one that is named or installed, a container, as for users' tests
(`aio_pika_batch.testing.rabbitmq.find`); and a private node of the ``rabbitmq-server`` that this
machine's package manager can install.

On a build machine, where ``CI`` is set, the last two change places: nobody minds what is installed
there, and only a node of our own can be hurt by the tests that are about that.

There is no "none": tests that are skipped because no broker was found look just like tests that
passed.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.testing.rabbitmq import find as shipped
from aio_pika_batch.testing.rabbitmq.find import SERVER, URL, Broker, NoBrokerError, Way
from tests.support.packages import InstallError, brought, install_commands

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SERVER", "URL", "Broker", "NoBrokerError", "Way", "choose"]


def choose() -> Way:
    """Return the best way to a broker; raise ``NoBrokerError`` if there is none."""
    if way := shipped.on_this_machine():
        return way
    last_resorts = [shipped.by_docker, _by_installing]
    if os.environ.get("CI"):
        last_resorts.reverse()
    for resort in last_resorts:
        if way := resort():
            return way
    raise NoBrokerError(
        f"""There is no RabbitMQ to test on. Tried, in this order:
{shipped.TRIED}
  - a package manager: no brew, and no apt-get or dnf with the right to install
{shipped.HELP}"""
    )


def _by_installing() -> Way | None:
    commands = _install_commands()
    if commands is None:
        return None
    last = " ".join(commands[-1])
    return Way(f"a private node, after `{last}`", True, lambda folder: _install(commands, folder))


@contextmanager
def _install(commands: list[list[str]], folder: Path) -> Iterator[Broker]:
    try:
        server = brought(commands, shipped.installed, "rabbitmq-server")
    except InstallError as error:
        raise NoBrokerError(str(error)) from error
    with shipped.node(server, folder) as broker:
        yield broker


def _install_commands() -> list[list[str]] | None:
    return install_commands("rabbitmq-server", brew="rabbitmq")
