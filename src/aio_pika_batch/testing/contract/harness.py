"""How is a transport looked at from behind its back?

What a transport says of itself proves nothing: a message that is lost on the way in is not missed
on the way out. So whatever sets a scene, and whatever looks at what has become of it, goes past it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from aio_pika_batch.transport import Transport


class Harness(ABC):
    """One broker for one clause, with an empty queue. None of its methods use the transport.

    Attributes:
        transport: What is held to the contract.
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
        """How many messages wait in a queue, without those handed out; None: no such queue."""

    @abstractmethod
    async def take(self, queue: str) -> list[bytes]:
        """Take all messages that wait in a queue, the oldest first."""

    async def cut(self) -> None:
        """Cut all connections of the transport; new ones may come. For `can_cut`."""
        raise NotImplementedError("Features.can_cut promises Harness.cut")

    async def hush(self) -> None:
        """Let no answer to a publication reach the transport until `cut`. For `can_hush`."""
        raise NotImplementedError("Features.can_hush promises Harness.hush")

    async def end_subscriptions(self) -> None:
        """End all consumers of `queue`, as its deletion does. For `can_end_subscriptions`."""
        raise NotImplementedError(
            "Features.can_end_subscriptions promises Harness.end_subscriptions"
        )

    async def lock_out(self) -> None:
        """Let nobody connect from now on. For `can_lock_out`."""
        raise NotImplementedError("Features.can_lock_out promises Harness.lock_out")
