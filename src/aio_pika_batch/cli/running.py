"""How does one process run its consumers, from the event loop to the exit code?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from importlib.util import find_spec
from typing import Any

from aio_pika_batch.cli.exits import Exit, exit_of_all
from aio_pika_batch.cli.options import LoopName
from aio_pika_batch.cli.targets import AnyConsumer
from aio_pika_batch.errors import AioPikaBatchError, ConfigurationError
from aio_pika_batch.logs import KeywordLogger, format_error

_log = KeywordLogger(logging.getLogger("aio_pika_batch.cli"))

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def loop_factory(name: LoopName) -> LoopFactory:
    """The event loop of that name; `auto` is uvloop where it is installed.

    Raises:
        ConfigurationError: It is not installed.
    """
    if name == "asyncio" or (name == "auto" and find_spec("uvloop") is None):
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError as error:
        cure = "run pip install 'aio-pika-batch[uvloop]', or use --loop asyncio"
        msg = f"--loop uvloop: {error}; {cure}"
        raise ConfigurationError(msg) from error
    factory: LoopFactory = uvloop.new_event_loop
    return factory


def run_loop(work: Callable[[], Coroutine[Any, Any, Exit]], loop: LoopName) -> Exit:
    """Run a process's work to its end."""
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        return runner.run(work())


def run_all(consumers: Sequence[AnyConsumer]) -> Coroutine[Any, Any, Exit]:
    """Run consumers until all have ended; where one fails, the others are drained.

    They are begun by the call, not by awaiting it: whatever task is made after it and asks them to
    drain is heard.

    Returns:
        The exit code; what went wrong has been logged.
    """
    return _end(consumers, [asyncio.ensure_future(consumer.run()) for consumer in consumers])


async def _end(consumers: Sequence[AnyConsumer], running: Sequence[asyncio.Task[None]]) -> Exit:
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for consumer in consumers:
            consumer.request_stop()
    results = await asyncio.gather(*running, return_exceptions=True)
    for consumer, result in zip(consumers, results, strict=True):
        if result is not None:
            _tell(consumer, result)
    return exit_of_all(each for each in results if each is not None)


def _tell(consumer: AnyConsumer, error: BaseException) -> None:
    """Say why a consumer has ended: in a line if the reason is known, else with the traceback."""
    known = isinstance(error, AioPikaBatchError)
    _log.error(
        "a consumer has failed",
        exc_info=None if known else error,
        consumer=type(consumer).__name__,
        queue=consumer.settings.queue_name,
        error=format_error(error),
    )
