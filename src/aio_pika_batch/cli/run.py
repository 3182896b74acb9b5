"""How are consumers run from a terminal?"""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

from cyclopts import Parameter

from aio_pika_batch.cli.exits import Exit, exit_of_all
from aio_pika_batch.cli.targets import AnyConsumer, Loading, load

_log = logging.getLogger("aio_pika_batch.cli")


def run(
    target: str,
    /,
    *more: str,
    workers: Annotated[int | None, Parameter(alias="-w")] = None,
    drain_timeout: float | None = None,
    loading: Loading | None = None,
) -> int:
    """Run consumers until SIGTERM or Ctrl-C, then drain.

    Args:
        target: A consumer, as module:attribute.
        more: Further ones, to run beside it in the same process.
        workers: Workers of each, instead of `num_workers`.
        drain_timeout: Seconds for the drain, instead of `shutdown_timeout`.
        loading: How they are found.
    """
    logging.basicConfig(level=logging.INFO)
    given = {"num_workers": workers, "shutdown_timeout": drain_timeout}
    consumers = [load(target, loading or Loading(), **given) for target in (target, *more)]
    return asyncio.run(run_all(consumers))


async def run_all(consumers: list[AnyConsumer]) -> Exit:
    """Run them until all have ended; where one fails, the others are drained."""
    running = [asyncio.ensure_future(consumer.run()) for consumer in consumers]
    await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
    for consumer in consumers:
        consumer.request_stop()
    results = await asyncio.gather(*running, return_exceptions=True)
    return exit_of_all(each for each in results if each is not None)
