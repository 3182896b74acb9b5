"""A broker on a socket that leaves chosen requests unanswered, while its heartbeats go on.

It knows just enough of AMQP to be consumed from. So does a real broker behave whose channel waits
for a queue without a leader.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

if TYPE_CHECKING:
    from pamqp.base import Frame

CAPABILITIES = ("publisher_confirms", "consumer_cancel_notify", "basic.nack")

ANSWERS: dict[type[Frame], Any] = {
    commands.Connection.StartOk: lambda _: commands.Connection.Tune(2047, 131072, 1),
    commands.Connection.Open: lambda _: commands.Connection.OpenOk(),
    commands.Connection.Close: lambda _: commands.Connection.CloseOk(),
    commands.Channel.Open: lambda _: commands.Channel.OpenOk(),
    commands.Channel.Close: lambda _: commands.Channel.CloseOk(),
    commands.Queue.Declare: lambda asked: commands.Queue.DeclareOk(asked.queue, 0, 0),
    commands.Queue.Bind: lambda _: commands.Queue.BindOk(),
    commands.Exchange.Declare: lambda _: commands.Exchange.DeclareOk(),
    commands.Confirm.Select: lambda _: commands.Confirm.SelectOk(),
    commands.Basic.Qos: lambda _: commands.Basic.QosOk(),
    commands.Basic.Consume: lambda asked: commands.Basic.ConsumeOk(asked.consumer_tag),
    commands.Basic.Cancel: lambda asked: commands.Basic.CancelOk(asked.consumer_tag),
    commands.Tx.Select: lambda _: commands.Tx.SelectOk(),
    commands.Tx.Commit: lambda _: commands.Tx.CommitOk(),
    commands.Tx.Rollback: lambda _: commands.Tx.RollbackOk(),
}


class SilentBroker:
    """A broker for one test.

    Args:
        messages: How many messages each consumer gets at once.

    Attributes:
        silent: Requests that are not answered.
        asked: How often each request came.
    """

    def __init__(self, messages: int = 0) -> None:
        self.silent: set[type[Frame]] = set()
        self.asked: Counter[type[Frame]] = Counter()
        self._messages = messages
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    @property
    def url(self) -> str:
        """Its URL."""
        return f"amqp://guest:guest@127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        beating = asyncio.ensure_future(_beat(writer))
        self._tasks.add(beating)
        try:
            await reader.readexactly(8)
            properties: Any = {
                "product": "RabbitMQ",
                "version": "4.0.0",
                "capabilities": dict.fromkeys(CAPABILITIES, True),
            }
            start = commands.Connection.Start(0, 9, properties, "PLAIN", "en_US")
            writer.write(frame.marshal(start, 0))
            while True:
                head = await reader.readexactly(7)
                rest = await reader.readexactly(int.from_bytes(head[3:]) + 1)
                _, channel, request = frame.unmarshal(head + rest)
                self._answer(writer, channel, request)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            beating.cancel()
            writer.close()

    def _answer(self, writer: asyncio.StreamWriter, channel: int, request: Any) -> None:
        kind = type(request)
        self.asked[kind] += 1
        if kind in self.silent or kind not in ANSWERS:
            return
        writer.write(frame.marshal(ANSWERS[kind](request), channel))
        if kind is commands.Basic.Consume:
            for tag in range(1, self._messages + 1):
                deliver = commands.Basic.Deliver(request.consumer_tag, tag, False, "", "q")
                parts = (
                    deliver,
                    ContentHeader(0, 1, commands.Basic.Properties()),
                    ContentBody(b"x"),
                )
                writer.writelines(frame.marshal(part, channel) for part in parts)


async def _beat(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(0.5)
        writer.write(frame.marshal(Heartbeat(), 0))
