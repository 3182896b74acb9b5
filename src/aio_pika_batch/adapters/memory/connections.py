"""What holds a client's channels together, and what goes with it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.channels import Channel

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.broker import Broker


class Connection:
    """One connection of a client.

    Attributes:
        closed: Why it is closed; None while it is open.
    """

    def __init__(self, broker: Broker, name: str, user: str) -> None:
        self._broker = broker
        self.name = name
        self.user = user
        self.channels: list[Channel] = []
        self.closed: str | None = None

    @property
    def version(self) -> str:
        """The broker's, as it tells its clients."""
        return self._broker.dialect.version

    def channel(self, notify: Callable[[], None] | None = None) -> Channel:
        """Open a channel.

        Args:
            notify: Called after each thing that the broker sends. It must not call the broker.
        """
        channel = Channel(self._broker, self, notify)
        channel.closed = self.closed
        self.channels.append(channel)
        return channel

    def close(self) -> None:
        """Close, with all its channels."""
        with self._broker.operation():
            self.end("closed by the client")

    def end(self, words: str) -> None:
        """Close from the broker's side."""
        if self.closed is None:
            self.closed = words
            self._broker.forget(self)
            for channel in list(self.channels):
                self.drop(channel, words)
            self._broker.delete_queues_of(self)

    def drop(self, channel: Channel, words: str) -> None:
        """Close one channel."""
        if channel in self.channels:
            self.channels.remove(channel)
            channel.shut(self._broker.vhost, words)
