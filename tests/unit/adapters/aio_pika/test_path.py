"""The files that an acknowledged batch passes through, from the socket to the handler and back."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from yarl import URL

import aio_pika_batch
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.adapters.aio_pika.frame_fastpath import pack_settlements
from aio_pika_batch.adapters.aio_pika.frame_tap import FrameTap
from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
from aio_pika_batch.core.settlement import Disposition, Frame
from tests.unit.adapters.aio_pika.broker_frames import delivery
from tests.unit.adapters.aio_pika.test_frame_tap import Socket
from tests.unit.adapters.aio_pika.test_session import FakeChannel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from types import FrameType

    import pytest

    from aio_pika_batch import Message
    from aio_pika_batch.transport import Subscription

PACKAGE = Path(aio_pika_batch.__file__).parent

MOST_FILES = 12
READ = 1000
"""Bytes of one read, which ends within a message."""
ACK = Disposition.ACK


class Importer(BatchConsumer):
    """Handles messages as most consumers do, and has no observer, breaker or key."""

    handled = 0

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        for message in messages:
            assert message.body
            yield MessageResult.ACK
        self.handled += len(messages)


class OneSession:
    """A transport whose only session has the adapter's code from the socket on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._channel = FakeChannel()
        self._channel.answer.set()
        self._protocols: list[Any] = []
        self.socket = Socket()
        self.consumer_tag = ""

    async def declare(self, _: Any) -> None:
        """Accept any topology."""

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[AioPikaSession]:
        self._monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", self._connect)
        tap = FrameTap(heartbeat=0)
        await tap.create(URL("amqp://localhost"), ssl_context_provider=None)
        connection: Any = SimpleNamespace(
            is_fast=True,
            is_rabbitmq=True,
            product=("RabbitMQ", "4.3.0"),
            tap=tap,
            channel=self._open_channel,
            close=self._close,
            address="there",
        )
        session = AioPikaSession(connection, subscription)
        await session.open(1)
        self.consumer_tag = subscription.consumer_tag
        yield session
        await session.close()

    async def _connect(self, factory: Any, *_: Any, **__: Any) -> tuple[Socket, Any]:
        self._protocols.append(factory())
        self._protocols[0].connection_made(self.socket)
        return self.socket, self._protocols[0]

    async def _open_channel(self) -> FakeChannel:
        return self._channel

    async def _close(self) -> None:
        self.socket.closing = True

    def receive(self, data: bytes) -> None:
        """Receive bytes in one read."""
        self._protocols[0].get_buffer(-1)[: len(data)] = data
        self._protocols[0].buffer_updated(len(data))


@contextmanager
def traced() -> Iterator[dict[str, set[str]]]:
    """Note each file of the package that runs, with its functions; not the loop of virtual time."""
    files: defaultdict[str, set[str]] = defaultdict(set)

    def profile(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and "testing" not in path.parts:
            files[str(path.relative_to(PACKAGE))].add(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        yield files
    finally:
        sys.setprofile(None)


async def test_an_acknowledged_batch_passes_through_few_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full batches, batches that time out, and reads that end within a message."""
    transport = OneSession(monkeypatch)
    # With a prefetch count of its own: to adapt one, the consumer only counts what it has acked.
    settings = BatchConsumerSettings(
        _env_file=None, queue_name="q", url="memory://", prefetch_count=20
    )
    consumer = Importer(settings, transport=transport)
    count = 4 * settings.batch_size + 2
    async with consumer:
        deliveries = [
            b"".join(delivery(tag, consumer_tag=transport.consumer_tag, channel=1))
            for tag in range(1, count + 1)
        ]
        # The first message of a session is looked at once: is its queue a stream?
        transport.receive(deliveries[0])
        await asyncio.sleep(2 * settings.batch_timeout)
        frames = b"".join(deliveries[1:])
        with traced() as files:
            for at in range(0, len(frames), READ):
                transport.receive(frames[at : at + READ])
                await asyncio.sleep(0)
            await asyncio.sleep(2 * settings.batch_timeout)
        assert consumer.handled == count
        assert transport.socket.written.endswith(pack_settlements(1, [Frame(ACK, count)]))

    passed = "\n".join(f"{file}: {', '.join(sorted(files[file]))}" for file in sorted(files))
    assert {"adapters/aio_pika/frame_tap.py", "core/settlement.py"} <= set(files), passed
    assert len(files) <= MOST_FILES, f"{len(files)} files:\n{passed}"
