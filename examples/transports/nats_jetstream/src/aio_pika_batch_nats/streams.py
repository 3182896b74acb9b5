"""Declares a topology on NATS.

A queue is a stream with work-queue retention, and a binding is one more subject of that stream. A
subject belongs to one stream only, so a key of an exchange leads to only one queue; the server
refuses a second one. Exchanges aren't declared: they exist while something is bound to them.
"""

from __future__ import annotations

from collections.abc import Iterable

from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError, NotFoundError

from aio_pika_batch.transport import Binding, Exchange, Queue, Topology, TopologyError
from aio_pika_batch_nats.link import explained
from aio_pika_batch_nats.names import bound_subjects, everything_of, subject_of, token

AUTO_DELETE = "aio-pika-batch: goes with its last consumer"
"""A flag that is stored in a stream's description."""

_READ_BY_CONSUMERS = {"x-dead-letter-exchange", "x-dead-letter-routing-key"}
_MAX_LENGTH = "x-max-length"
_OVERFLOW = "x-overflow"


async def declare(jetstream: JetStreamContext, topology: Topology) -> None:
    """Declare and check.

    Raises:
        TopologyError: It differs, doesn't exist, or isn't possible on NATS.
        BrokerUnavailable: No server answers.
    """
    for exchange in topology.exchanges:
        await _check_exchange(jetstream, exchange)
    for queue in topology.queues:
        await _declare_queue(jetstream, queue)
    kinds = {exchange.name: exchange.type for exchange in topology.exchanges}
    for binding in topology.bindings:
        await _bind(jetstream, binding, kinds.get(binding.exchange, "direct"))


async def _check_exchange(jetstream: JetStreamContext, exchange: Exchange) -> None:
    what = f"exchange {exchange.name!r}"
    if exchange.check_only and not await bound_streams(jetstream, exchange.name):
        raise TopologyError(f"{what}: no queue is bound to it; start its consumer first")


async def _declare_queue(jetstream: JetStreamContext, queue: Queue) -> None:
    what = f"queue {queue.name!r}"
    wanted = _config(queue, what)
    with explained(what):
        try:
            found = await jetstream.stream_info(token(queue.name))
        except NotFoundError:
            if queue.check_only:
                raise
            try:
                await jetstream.add_stream(wanted)
            except BadRequestError:
                # Another client was faster, and has bound it already.
                found = await jetstream.stream_info(token(queue.name))
            else:
                return
    if queue.check_only or queue.existing_first:
        return
    for name in ("retention", "storage", "max_msgs", "discard", "description"):
        here, there = getattr(wanted, name), getattr(found.config, name)
        if (here or None) != (there or None):
            raise TopologyError(
                f"{what}: its stream has {name} {there!r} instead of {here!r}; declare it as it"
                " is, or delete the stream, or set declare=False to take it as it is"
            )


def _config(queue: Queue, what: str) -> StreamConfig:
    if queue.holds_retries:
        raise TopologyError(f"{what}: NATS has no wait queues; set requeue_delay=0")
    if queue.exclusive:
        raise TopologyError(f"{what}: NATS has no exclusive queues; set queue_exclusive=False")
    known = {_MAX_LENGTH, _OVERFLOW} | _READ_BY_CONSUMERS
    if unknown := sorted(queue.arguments.keys() - known):
        raise TopologyError(f"{what}: NATS has nothing like {', '.join(unknown)}; leave it out")
    overflow = queue.arguments.get(_OVERFLOW, "drop-head")
    length = queue.arguments.get(_MAX_LENGTH, -1)
    if overflow not in {"drop-head", "reject-publish"} or not isinstance(length, int):
        raise TopologyError(f"{what}: {_MAX_LENGTH} or {_OVERFLOW} has a value that NATS lacks")
    return StreamConfig(
        name=token(queue.name),
        subjects=[subject_of("", queue.name)],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE if queue.durable else StorageType.MEMORY,
        max_msgs=length,
        discard=DiscardPolicy.NEW if overflow == "reject-publish" else DiscardPolicy.OLD,
        description=AUTO_DELETE if queue.auto_delete else None,
    )


async def _bind(jetstream: JetStreamContext, binding: Binding, kind: str) -> None:
    what = f"binding queue {binding.queue!r} to exchange {binding.exchange!r}"
    if binding.arguments:
        raise TopologyError(f"{what}: NATS has no binding arguments; leave them out")
    wanted = bound_subjects(binding.exchange, kind, binding.routing_key)
    await _change_subjects(jetstream, token(binding.queue), what, add=wanted)


async def bound_streams(jetstream: JetStreamContext, exchange: str) -> list[str]:
    """Return the streams that are bound to an exchange."""
    start = everything_of(exchange)[:-1]
    bound: list[str] = []
    seen = 0
    with explained(f"exchange {exchange!r}"):
        while page := await jetstream.streams_info(offset=seen):
            seen += len(page)
            bound.extend(
                info.config.name or ""
                for info in page
                if any(each.startswith(start) for each in info.config.subjects or ())
            )
    return bound


async def delete_exchange(jetstream: JetStreamContext, exchange: str) -> None:
    """Unbind all queues from an exchange; their messages stay."""
    start = everything_of(exchange)[:-1]
    for stream in await bound_streams(jetstream, exchange):
        await _change_subjects(jetstream, stream, f"exchange {exchange!r}", drop=start)


async def _change_subjects(
    jetstream: JetStreamContext,
    stream: str,
    what: str,
    *,
    add: Iterable[str] = (),
    drop: str | None = None,
) -> None:
    with explained(what):
        config = (await jetstream.stream_info(stream)).config
        had = config.subjects or []
        kept = [each for each in had if drop is None or not each.startswith(drop)]
        config.subjects = list(dict.fromkeys([*kept, *add]))
        if config.subjects != had:
            await jetstream.update_stream(config)
