"""The library receives everything that is its own, and errors of the socket are reported."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiormq.exceptions import AMQPConnectionError
from pamqp import commands
from yarl import URL

from aio_pika_batch.adapters.aio_pika.events import ConnectionLost, Deliveries, Malformed
from aio_pika_batch.adapters.aio_pika.frame_tap import FrameTap
from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.transport import Subscription
from tests.unit.adapters.aio_pika.broker_frames import CHANNEL, HEARTBEAT, Source, delivery, method

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.testing.virtual_time import VirtualTimeLoop

    Opened = Callable[..., Coroutine[Any, Any, "Line"]]

ANSWER = method(commands.Basic.QosOk())
ACK = b"\x01\x00\x03 an ack, packed"


class Socket(asyncio.Transport):
    """A socket whose other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.waiting = 0
        self.aborted = False
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.aborted = self.closing = True

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return 1, 2


class Line:
    """A tap on an open socket, with a tapped consumer."""

    def __init__(self, tap: FrameTap, socket: Socket, protocol: Any, reader: Any) -> None:
        self.tap = tap
        self.socket = socket
        self.protocol = protocol
        self.reader = reader
        self.received: list[Event] = []
        self.breaks = False
        tap.listen(self._on_event).tap_consumer(CHANNEL, Source())

    def _on_event(self, event: Event) -> None:
        self.received.append(event)
        if self.breaks:
            raise ZeroDivisionError("a listener is wrong")

    def receive(self, *frames: bytes) -> None:
        """Receive frames in one read."""
        data = b"".join(frames)
        self.protocol.get_buffer(-1)[: len(data)] = data
        self.protocol.buffer_updated(len(data))

    async def passed(self) -> bytes:
        """The bytes that the library can read."""
        self.reader.feed_eof()
        data: bytes = await self.reader.read()
        return data


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Opens a fake socket."""
    socket = Socket()

    async def open_line(*, heartbeat: int = 0) -> Line:
        made: list[Any] = []

        async def create_connection(factory: Any, *_: Any, **__: Any) -> tuple[Socket, Any]:
            made.append(factory())
            made[0].connection_made(socket)
            return socket, made[0]

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
        tap = FrameTap(heartbeat)
        reader, _ = await tap.create(URL("amqp://localhost"), ssl_context_provider=None)
        return Line(tap, socket, made[0], reader)

    yield open_line
    socket.closing = True


@pytest.fixture
def loop_errors(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The contexts that the event loop's exception handler is called with."""
    received: list[dict[str, Any]] = []
    loop_class = asyncio.BaseEventLoop
    monkeypatch.setattr(loop_class, "call_exception_handler", lambda _, what: received.append(what))
    return received


async def test_deliveries_are_taken_out_and_the_rest_is_passed_on(opened: Opened) -> None:
    """In order, within one read."""
    line = await opened()
    line.receive(ANSWER, *delivery(1), HEARTBEAT, *delivery(2), ANSWER)

    tags = [
        message.delivery_tag
        for event in line.received
        if isinstance(event, Deliveries)
        for message in event.messages
    ]
    assert [1, 2] == tags
    assert ANSWER + HEARTBEAT + ANSWER == await line.passed()


async def test_a_failing_listener_affects_nothing_else(
    opened: Opened, loop_errors: list[dict[str, Any]]
) -> None:
    """The rest of the same read is reported and passed on."""
    line = await opened()
    line.breaks = True
    line.receive(*delivery(1), ANSWER, *delivery(2), ANSWER)

    assert 2 == len(line.received)
    assert [ZeroDivisionError] * 2 == [type(each["exception"]) for each in loop_errors]
    assert ANSWER * 2 == await line.passed()


async def test_bytes_that_are_not_amqp_end_the_connection(opened: Opened) -> None:
    """For the library, the listener and the peer. It is reported once."""
    line = await opened()
    line.receive(HEARTBEAT, b"\x63 is no frame")
    line.receive(*delivery(1))
    line.protocol.connection_lost(None)

    (event,) = line.received
    assert isinstance(event, Malformed)
    assert event == line.tap.end
    assert line.socket.aborted
    with pytest.raises(AMQPConnectionError, match="does not begin an AMQP 0-9-1 frame"):
        await line.reader.read()


@pytest.mark.parametrize("error", [OSError(113, "No route to host"), ConnectionRefusedError()])
async def test_connection_errors_are_aiormqs(
    monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """As those of its own factories are."""

    async def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", fail)

    with pytest.raises(AMQPConnectionError) as raised:
        await FrameTap(0).create(URL("amqp://localhost"), ssl_context_provider=None)
    assert error is raised.value.__cause__


async def test_data_is_written_at_once(opened: Opened) -> None:
    """Unchanged."""
    line = await opened()

    assert line.tap.write(ACK)
    assert ACK == line.socket.written


async def test_nothing_is_written_after_the_library_closed_the_socket(opened: Opened) -> None:
    """Some event loops raise then, and others don't."""
    line = await opened()
    line.socket.closing = True

    assert not line.tap.write(ACK)
    assert b"" == line.socket.written


async def test_nothing_is_written_after_the_connection_ended(opened: Opened) -> None:
    """Whichever side ended it."""
    line = await opened()
    line.protocol.eof_received()

    assert not line.tap.write(ACK)
    assert [ConnectionLost("the broker closed the connection without a reason")] == line.received


async def test_a_settlement_that_waits_for_room_fails_with_its_connection(opened: Opened) -> None:
    """The session is lost. The error is the library's own type."""
    line = await opened()
    connection: Any = SimpleNamespace(tap=line.tap, address="there", is_fast=True, is_rabbitmq=True)
    session = AioPikaSession(
        connection, Subscription(queue="q", prefetch=10, consumer_tag="consumer-1")
    )
    line.tap.listen(session.on_event).tap_consumer(CHANNEL, Source())
    line.receive(*delivery(1), *delivery(2))
    await anext(session)
    line.protocol.pause_writing()
    await session.settle([Settlement(Disposition.ACK, (1,))])  # there is room
    line.socket.waiting = 3
    draining = asyncio.create_task(session.settle([Settlement(Disposition.ACK, (2,))]))
    await asyncio.sleep(1)
    assert not draining.done()

    line.protocol.connection_lost(ConnectionResetError("reset by peer"))

    with pytest.raises(SessionLost, match="the connection broke"):
        await draining


async def test_the_library_gets_heartbeats_while_everything_is_taken_out(opened: Opened) -> None:
    """One a second while bytes arrive, and none in silence."""
    line = await opened(heartbeat=10)
    for tag in range(40):
        await asyncio.sleep(0.1)
        line.receive(*delivery(tag + 1))
    await asyncio.sleep(5)

    assert HEARTBEAT * 3 == await line.passed()


async def test_silence_is_noticed_after_three_heartbeats(
    opened: Opened, virtual_loop: VirtualTimeLoop
) -> None:
    """Counted from the last byte."""
    line = await opened(heartbeat=2)
    await asyncio.sleep(5)
    line.receive(HEARTBEAT)
    await asyncio.sleep(5.9)
    assert not line.received
    await asyncio.sleep(0.2)

    assert [ConnectionLost("the broker has sent nothing for 6 s")] == line.received
    assert line.socket.aborted
    assert 11 < virtual_loop.time() < 11.2
