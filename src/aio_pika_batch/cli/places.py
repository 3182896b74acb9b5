"""Which queue is meant, and which of its letters?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from aio_pika_batch.cli.printing import hush
from aio_pika_batch.cli.targets import Loading, load, prepare
from aio_pika_batch.consumer import Consumer
from aio_pika_batch.core.dead_letter import Filter
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.queue_browser import MOST_HELD
from aio_pika_batch.runtime.signals import process_signals
from aio_pika_batch.settings import ConsumerSettings
from aio_pika_batch.transport import Transport

T = TypeVar("T")


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which queue is meant."""

    queue: str | None = None
    """The dead-letter queue, where no consumer is named, or its settings do not name one."""
    delivery_limit: int | None = None
    """The delivery limit of that queue, where a policy sets it; -1: there is none."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Meant:
    """Which letters are meant: those that meet all of it."""

    reason: Annotated[tuple[str, ...], Parameter(negative_iterable="")] = ()
    """Only those that died for it: rejected, exhausted, handler-error, undecodable, expired, …"""
    older_than: timedelta | None = None
    """Only those that died longer ago, as 90s, 15m, 2h, 3d."""
    newer_than: timedelta | None = None
    """Only those that died since."""
    header: Annotated[tuple[str, ...], Parameter(negative_iterable="")] = ()
    """Only those with a header of this value, as name=value."""
    limit: int | None = None
    """At most so many."""

    @property
    def filter(self) -> Filter:
        """The same for the library. Raises ConfigurationError."""
        headers = {}
        for each in self.header:
            name, equals, value = each.partition("=")
            if not equals:
                raise ConfigurationError(f"--header: write name=value, not {each!r}")
            headers[name] = value
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError("--limit: must be at least 1")
        return Filter(
            reasons=frozenset(self.reason),
            older_than=self.older_than,
            newer_than=self.newer_than,
            headers=headers,
        )


class _Nobody(Consumer):
    """Stands for a queue whose consumer was not named."""

    async def process_message(self, message: Message) -> MessageResult:
        """Never called."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Found:
    """A queue to look into.

    Attributes:
        how: What is known of it, as arguments for `aio_pika_batch.dead_letters`.
    """

    transport: Transport
    queue: str
    how: dict[str, Any]


def find(target: str | None, place: Place | None, loading: Loading | None) -> Found:
    """Find the dead-letter queue of a consumer, or that of a name. Raises ConfigurationError."""
    hush()
    place, loading = place or Place(), loading or Loading()
    if target is not None:
        consumer: Any = load(target, loading)
        queue = place.queue or consumer.settings.dead_letter_queue
        if queue is None:
            raise ConfigurationError(
                f"{target}: its settings name no dead_letter_queue; name the queue by --queue"
            )
    elif place.queue is not None:
        prepare(loading)
        queue = place.queue
        given = {} if loading.url is None else {"url": loading.url}
        consumer = _Nobody(ConsumerSettings(queue_name=queue, **given))
    else:
        raise ConfigurationError("name a consumer, as module:attribute, or a queue by --queue")
    how: dict[str, Any] = {"retry_count_header": consumer.settings.retry_count_header}
    if place.delivery_limit is not None:
        how["delivery_limit"] = place.delivery_limit
    return Found(consumer._transport, queue, how)  # noqa: SLF001  -- our own


def interruptible(work: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run something that a first signal asks to end, and a second one ends."""

    async def main() -> T:
        stop = asyncio.Event()
        task = asyncio.ensure_future(work(stop))

        def abandon() -> None:
            task.cancel()

        with process_signals.listen(stop.set, abandon):
            return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def at_most(value: int, name: str) -> int:
    """A number that a session can hold. Raises ConfigurationError."""
    if not 1 <= value <= MOST_HELD:
        raise ConfigurationError(f"{name}: must be 1 to {MOST_HELD}, not {value}")
    return value
