"""What of a topology is on the broker already, and is it as it should be?

Nothing is created by asking. Queues and exchanges are looked for; what is there is declared once
more as it should be, to hear from the broker what differs. Bindings cannot be seen by AMQP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from aio_pika_batch.core.topology import Binding, Exchange, Queue, Topology, Version
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.transport import Transport, VersionedTransport

Entity: TypeAlias = Exchange | Queue | Binding


class State(Enum):
    """How something stands on a broker."""

    THERE = "exists"
    MISSING = "missing"
    DIFFERS = "differs"
    REFUSED = "refused"
    UNSEEN = "cannot be seen"


@dataclass(frozen=True, slots=True)
class Standing:
    """How one of them stands.

    Attributes:
        words: The broker's, where it says no.
    """

    entity: Entity
    state: State
    words: str = ""


async def inspect(transport: Transport, topology: Topology) -> list[Standing]:
    """Look for all of it.

    Raises:
        TransportError: There is no broker, or it does not let us in.
    """
    return [
        *[await _stands(transport, each) for each in topology.exchanges if each.name],
        *[await _stands(transport, each) for each in topology.queues],
        *[Standing(each, State.UNSEEN) for each in topology.bindings if each.exchange],
    ]


async def broker_version(transport: Transport) -> Version | None:
    """Which RabbitMQ it is; None if that cannot be told.

    Raises:
        TransportError: There is no broker, or it does not let us in.
    """
    await transport.declare(Topology(exchanges=(Exchange("amq.direct", check_only=True),)))
    return transport.broker_version if isinstance(transport, VersionedTransport) else None


async def _stands(transport: Transport, entity: Exchange | Queue) -> Standing:
    if isinstance(entity, Queue) and entity.exclusive:
        return Standing(entity, State.UNSEEN, "each session declares its own")
    try:
        await transport.declare(_only(replace(entity, check_only=True)))
    except TopologyError as error:
        words = str(error)
        missing = "404" in words or "NOT_FOUND" in words
        return Standing(entity, State.MISSING if missing else State.REFUSED, words)
    if entity.existing_first or entity.check_only:
        return Standing(entity, State.THERE)
    try:
        # It is there, so that nothing is created.
        await transport.declare(_only(entity))
    except TopologyError as error:
        return Standing(entity, State.DIFFERS, str(error))
    return Standing(entity, State.THERE)


def _only(entity: Exchange | Queue) -> Topology:
    if isinstance(entity, Queue):
        return Topology(queues=(entity,))
    return Topology(exchanges=(entity,))
