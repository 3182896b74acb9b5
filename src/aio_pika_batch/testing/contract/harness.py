"""What a third party provides to check a transport: its `Features` and a `Harness`.

What every transport must do is not a feature. Everything else is claimed feature by feature: the
contract checks what is claimed, and reports the rest as not applicable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from aio_pika_batch.transport import Transport


# Every feature is off by default, so that a third party can begin with the clauses that need none.
@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a transport claims, and what its harness can do to it.

    Attributes:
        keeps_order: Messages are delivered in the order in which they were put into the queue.
        keeps_place: Requeued and returned messages are delivered again before new ones.
        prefetches: Messages leave their queue before they are received, up to the prefetch count.
        marks_redelivered: A message that was delivered before is marked as redelivered.
        counts_deliveries: A requeued message has its number of deliveries in `delivery_count`.
        spares_returns: A returned message does not count as delivered.
        dead_letters: Rejected messages go to the queue `Harness.dead_letters`.
        returns_unroutable: A mandatory publication that can't be routed is `RETURNED`.
        refuses_when_full: A publication to the full queue `Harness.full` is `REFUSED`.
        has_exchanges: A publication to a missing exchange is `REFUSED`.
        limits_headers: The properties of a message must fit into a frame of 128 KiB.
        carries_properties: All properties of a message arrive, and absent ones stay absent.
        checks_users: A connection has a user, and a copy does not carry another user's name.
        declares: Queues can be declared, and `check_only` detects a missing one.
        compares: Declaring an existing queue with other arguments raises `TopologyError`.
        exclusive_consumers: A session can be the only consumer of a queue.
        exclusive_queues: A session can declare a queue that is deleted when the session ends.
        pumps: Its sessions can pump.
        proves: Its sessions know which settlements the broker has certainly received.
        adjusts: Its sessions can be paused, and resumed with another prefetch.
        retries: Its sessions can modify messages, so that they come back, or die, with headers.
        delays: A modified message can be delayed.
        confirms_settlements: Its sessions can wait until settlements have been carried out.
        listens: Its publishers report answers that come after their time limit.
        has_native: Its sessions have objects of the broker's own library.
        tells_version: It knows the version of RabbitMQ that it is connected to.
        counts_ready: It can count the ready messages of a queue.
        inspects: It knows the type of an exchange, and which wishes a queue lacks. For brokers that
            have the exchanges of RabbitMQ.
        can_cut: The harness can cut the transport's connections.
        can_hush: The harness can keep the broker's answers from the transport.
        can_end_subscriptions: The harness can make the broker end a consumer and keep its
            connection.
        can_lock_out: The harness can make the broker unreachable.
    """

    keeps_order: bool = False
    keeps_place: bool = False
    prefetches: bool = False
    marks_redelivered: bool = False
    counts_deliveries: bool = False
    spares_returns: bool = False
    dead_letters: bool = False
    returns_unroutable: bool = False
    refuses_when_full: bool = False
    has_exchanges: bool = False
    limits_headers: bool = False
    carries_properties: bool = False
    checks_users: bool = False
    declares: bool = False
    compares: bool = False
    exclusive_consumers: bool = False
    exclusive_queues: bool = False
    pumps: bool = False
    proves: bool = False
    adjusts: bool = False
    retries: bool = False
    delays: bool = False
    confirms_settlements: bool = False
    listens: bool = False
    has_native: bool = False
    tells_version: bool = False
    counts_ready: bool = False
    inspects: bool = False
    can_cut: bool = False
    can_hush: bool = False
    can_end_subscriptions: bool = False
    can_lock_out: bool = False


# A harness only counts what waits in a queue, since every broker can tell that. It can't always
# tell what is delivered and unsettled. So checks leave something unsettled on purpose, close the
# session, and count what comes back.
class Harness(ABC):
    """One broker for one clause, with an empty queue.

    None of its methods may use the transport: a message that the transport loses on the way in
    would not be missed on the way out.

    Attributes:
        transport: The transport under test.
        queue: The name of a queue that exists and is empty.
        fresh: The name of a queue that does not exist; a clause may declare it.
        dead_letters: Where rejected messages of `queue` go, for the feature of that name.
        full: A queue that takes at most five messages, for `refuses_when_full`.
    """

    transport: Transport
    queue: str
    fresh: str = "no-such-queue"
    dead_letters: str = ""
    full: str = ""

    @abstractmethod
    async def put(self, bodies: Sequence[bytes]) -> None:
        """Put messages into `queue`, in this order; they are there when it returns."""

    @abstractmethod
    async def count(self, queue: str) -> int | None:
        """Return how many messages wait in a queue, without unsettled ones; None: no such queue."""

    @abstractmethod
    async def take(self, queue: str) -> list[bytes]:
        """Remove all messages that wait in a queue, and return them, the oldest first."""

    async def cut(self) -> None:
        """Cut all connections of the transport; it may open new ones. For `can_cut`."""
        raise NotImplementedError("Features.can_cut promises Harness.cut")

    async def hush(self) -> None:
        """Keep all answers to publications from the transport until `cut`. For `can_hush`."""
        raise NotImplementedError("Features.can_hush promises Harness.hush")

    async def end_subscriptions(self) -> None:
        """End all consumers of `queue`, as its deletion does. For `can_end_subscriptions`."""
        raise NotImplementedError(
            "Features.can_end_subscriptions promises Harness.end_subscriptions"
        )

    async def lock_out(self) -> None:
        """Refuse all connections from now on. For `can_lock_out`."""
        raise NotImplementedError("Features.can_lock_out promises Harness.lock_out")
