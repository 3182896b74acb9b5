"""A connection logs in, lives and ends as it should, whatever the broker does."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import replace
from typing import Any

import pytest

from aio_pika_batch.adapters.amqp10 import performatives as p
from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Symbol, UInt
from aio_pika_batch.adapters.amqp10.connection import (
    CLOSE_TIMEOUT,
    Amqp10Connection,
    Amqp10Unsupported,
    Disconnected,
    open_amqp10,
)
from aio_pika_batch.adapters.amqp10.frames import ProtocolHeader, ReceivedRecord, pack
from aio_pika_batch.adapters.url import Address
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    TransportError,
)
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop
from tests.unit.adapters.amqp10.server import ADDRESS, SHOWN, Server, endpoint, sent


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, virtual_loop: VirtualTimeLoop) -> dict[str, Any]:
    """What answers at each host: a server, or the error of connecting to it."""
    servers: dict[str, Any] = {"broker": Server()}

    async def create_connection(make: Any, host: str, port: int, ssl: Any = None) -> Any:
        found = servers[host]
        if isinstance(found, BaseException):
            raise found
        if found is None:
            await asyncio.sleep(3600)
        protocol = make()
        found.connect(protocol, ssl)
        return found, protocol

    monkeypatch.setattr(virtual_loop, "create_connection", create_connection)
    return servers


@pytest.fixture
def server(servers: dict[str, Any]) -> Server:
    """The one at the usual host."""
    found: Server = servers["broker"]
    return found


async def opened(
    address: Address = ADDRESS, heartbeat: int = 10, **options: str
) -> Amqp10Connection:
    """A connection that is open."""
    return await open_amqp10(endpoint(replace(address, options=options), heartbeat=heartbeat))


async def refusal(*addresses: Address, **options: str) -> TransportError:
    """Why it could not be opened."""
    usual = replace(ADDRESS, tls="cafile" in options, options=options)
    with pytest.raises(TransportError) as caught:
        await open_amqp10(endpoint(*(addresses or [usual])))
    assert "s3cret" not in str(caught.value)
    return caught.value


def tls_error() -> ssl.SSLError:
    """As OpenSSL's are."""
    error = ssl.SSLError(1, "oops")
    error.reason = "ALERT"
    return error


# --- logging in ------------------------------------------------------------------------


async def test_a_connection_logs_in_and_says_what_it_wants(server: Server) -> None:
    """User and password, the virtual host, frames and signs of life."""
    connection = await opened()

    assert [
        ProtocolHeader(spec.SASL_HEADER),
        p.Init(Symbol("PLAIN"), b"\0user\0s3cret"),
        ProtocolHeader(spec.AMQP_HEADER),
        p.Open("container", "vhost:v/1", UInt(2**20), 1, UInt(20_000)),
    ] == server.received
    assert (4, 3, 6) == connection.version
    await connection.close()


async def test_a_certificate_can_take_the_place_of_a_password(server: Server) -> None:
    """One mechanism of several; the user is the certificate's."""
    server.mechanisms.append("EXTERNAL")
    connection = await opened(replace(ADDRESS, tls=True), auth="external")

    assert [p.Init(Symbol("EXTERNAL"), b"")] == sent(server, p.Init)
    assert isinstance(server.context, ssl.SSLContext)
    await connection.close()


async def test_a_single_mechanism_may_come_alone(server: Server) -> None:
    """As a symbol in place of an array."""
    alone = pack(p.Mechanisms(Symbol("PLAIN")), 0, spec.SASL_FRAME)
    server.greeting = alone
    connection = await opened()
    await connection.close()


async def test_another_product_has_no_version(server: Server) -> None:
    """Its numbers would mean something else."""
    server.opened = p.Open("other", properties={Symbol("product"): "Other"})
    connection = await opened()
    assert connection.version is None
    await connection.close()


async def test_each_refusal_has_its_error(server: Server) -> None:
    """With what to do about it; and the socket is dropped."""
    server.outcome = 1
    error = await refusal()
    assert isinstance(error, AccessRefused)
    assert f"{SHOWN} refused the login of user 'user'; check user" in str(error)
    assert server.is_aborted


async def test_the_error_for_guest_says_that_it_may_only_log_in_locally(server: Server) -> None:
    """What most who see this error need to know."""
    server.outcome = 1
    assert "only from the broker's own machine" in str(
        await refusal(replace(ADDRESS, user="guest"))
    )


async def test_a_mechanism_that_is_not_offered_is_not_tried(server: Server) -> None:
    """So that the password is not sent by another."""
    error = await refusal(auth="external")
    assert isinstance(error, AccessRefused)
    assert "does not offer to log in by auth=external" in str(error)
    assert [] == sent(server, p.Init)


async def test_a_broker_that_hangs_up_gives_no_reason(server: Server) -> None:
    """It is guessed; declaring over 0-9-1 has given it before."""
    server.opened = None
    error = await refusal()
    assert isinstance(error, BrokerUnavailable)
    assert "check that the virtual host 'v/1' exists" in str(error)


async def test_a_broker_that_closes_says_why(server: Server) -> None:
    """Instead of opening."""
    server.opened = p.Close(p.PeerError(Symbol("amqp:resource-limit-exceeded"), "too many"))
    error = await refusal()
    assert isinstance(error, BrokerUnavailable)
    assert "amqp:resource-limit-exceeded: too many; try again later" in str(error)


async def test_a_server_that_isnt_a_broker_is_refused(server: Server) -> None:
    """Something else listens there."""
    server.header = b"HTTP/1.1"
    error = await refusal()
    assert isinstance(error, BrokerUnavailable)
    assert "cannot be reached: it closed the connection during the login" in str(error)


@pytest.mark.parametrize("header", [b"AMQP\x00\x00\x09\x01", spec.AMQP_HEADER])
async def test_another_protocol_is_recognised(server: Server, header: bytes) -> None:
    """Such as that of an older RabbitMQ."""
    server.header = header
    error = await refusal()
    assert isinstance(error, Amqp10Unsupported)
    assert "does not speak AMQP 1.0, as RabbitMQ does since 4.0" in str(error)


async def test_an_unexpected_frame_is_refused(server: Server) -> None:
    """It answers, and with something else."""
    server.opened = p.Flow(UInt(0), UInt(0), UInt(0), UInt(0))
    assert "it answered with ReceivedRecord" in str(await refusal())


async def test_silence_is_not_waited_for(server: Server, virtual_loop: VirtualTimeLoop) -> None:
    """Longer than for one attempt; in no phase of it."""
    server.is_silent = True
    assert "no answer within 10 s" in str(await refusal())
    assert 10 == virtual_loop.time()
    assert server.is_aborted


async def test_an_opening_that_is_cancelled_drops_the_socket(server: Server) -> None:
    """Nothing else would drop it."""
    server.is_silent = True
    opening = asyncio.create_task(opened())
    await asyncio.sleep(1)
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()
    assert server.is_aborted


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (ConnectionRefusedError(111, "refused"), BrokerUnavailable, "nothing listens there"),
        (socket.gaierror(socket.EAI_NONAME, "no name"), AccessRefused, "correct the host 'broker'"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), BrokerUnavailable, "cannot be looked up"),
        (ssl.SSLEOFError(8, "eof"), BrokerUnavailable, "ended during the TLS handshake"),
        (tls_error(), AccessRefused, "the TLS handshake failed"),
        (OSError("strange"), BrokerUnavailable, "cannot be reached: strange"),
        (TimeoutError(), BrokerUnavailable, "no answer within 10 s"),
    ],
)
async def test_the_error_says_why_a_socket_cannot_open(
    servers: dict[str, Any], failure: OSError, kind: type, text: str
) -> None:
    """As over 0-9-1."""
    servers["broker"] = failure
    error = await refusal()
    assert isinstance(error, kind)
    assert text in str(error)


async def test_a_certificate_that_is_refused_after_the_handshake_is_reported(
    server: Server,
) -> None:
    """As TLS 1.3 has it."""
    server.is_silent = True
    refused = asyncio.create_task(refusal())
    await asyncio.sleep(1)
    server.break_off(tls_error())
    assert "the TLS handshake failed" in str(await refused)


async def test_a_reset_is_the_cause_of_its_error(server: Server) -> None:
    """By it, a refused certificate is looked for whose alert was lost."""
    server.is_silent = True
    refused = asyncio.create_task(refusal())
    await asyncio.sleep(1)
    server.break_off(ConnectionResetError())
    hung_up = (await refused).__cause__
    assert hung_up is not None
    assert isinstance(hung_up.__cause__, ConnectionResetError)


async def test_files_that_are_being_replaced_are_waited_for(servers: dict[str, Any]) -> None:
    """They were right when the consumer started."""
    error = await refusal(cafile="/no/such/file")
    assert isinstance(error, BrokerUnavailable)
    assert "was not tried: url: cafile: there is no file" in str(error)


# --- several brokers -------------------------------------------------------------------


async def test_another_broker_is_tried(servers: dict[str, Any]) -> None:
    """Until one answers, in a random order."""
    servers["down"] = ConnectionRefusedError()
    servers["unknown"] = socket.gaierror(socket.EAI_NONAME, "no name")
    others = [replace(ADDRESS, host=host) for host in ("down", "unknown")]
    for _ in range(10):
        servers["broker"] = Server()
        connection = await open_amqp10(endpoint(*others, ADDRESS))
        assert ADDRESS == connection.address
        await connection.close()


async def test_the_worst_of_several_errors_decides(servers: dict[str, Any], server: Server) -> None:
    """A refusal is final, a wrong name among hosts that are down is not."""
    server.outcome = 1
    servers["down"] = ConnectionRefusedError()
    servers["unknown"] = socket.gaierror(socket.EAI_NONAME, "no name")
    down, unknown = (replace(ADDRESS, host=host) for host in ("down", "unknown"))

    assert isinstance(await refusal(down, unknown), BrokerUnavailable)
    error = await refusal(down, unknown, ADDRESS)
    assert isinstance(error, AccessRefused)
    assert "no address can be used: " in str(error)
    assert all(each in str(error) for each in ("down", "unknown", "refused the login"))
    assert isinstance(await refusal(unknown, replace(unknown, port=1)), AccessRefused)


# --- signs of life ---------------------------------------------------------------------


async def test_the_broker_hears_from_us_twice_in_its_time(server: Server) -> None:
    """It asked for something every 30 s."""
    connection = await opened(heartbeat=0)
    await asyncio.sleep(61)
    assert 4 == server.received.count("sign of life")
    await connection.close()
    await asyncio.sleep(60)
    assert 4 == server.received.count("sign of life")


async def test_a_broker_that_asks_for_nothing_gets_nothing(server: Server) -> None:
    """Neither is a timer left behind."""
    server.opened = p.Open("cluster")
    connection = await opened(heartbeat=0)
    await asyncio.sleep(1000)
    assert 0 == server.received.count("sign of life")
    await connection.close()


async def test_a_silent_broker_is_dead(server: Server, virtual_loop: VirtualTimeLoop) -> None:
    """After three heartbeats, counted from what it sent last."""
    connection = await opened()
    told: list[Any] = []
    connection.listen(told.append)
    for _ in range(5):
        await asyncio.sleep(9)
        server.say(b"\0\0\0\x08\x02\0\0\0")
    server.is_silent = True
    await asyncio.sleep(29)
    assert [] == told
    await asyncio.sleep(2)
    assert [Disconnected("the broker has sent nothing for 30 s")] == told
    assert server.is_aborted
    await connection.close()


# --- the end ---------------------------------------------------------------------------


async def test_a_close_is_confirmed(server: Server, virtual_loop: VirtualTimeLoop) -> None:
    """In good order, and the listener hears of the end once."""
    connection = await opened()
    told: list[Any] = []
    connection.listen(told.append)
    began = virtual_loop.time()
    await connection.close()
    await connection.close()
    assert virtual_loop.time() - began < 0.1
    assert 1 == len(sent(server, p.Close))
    assert 1 == len(told)
    connection.write([b"nothing is written any more"])


async def test_a_close_that_is_not_confirmed_ends_all_the_same(
    server: Server, virtual_loop: VirtualTimeLoop
) -> None:
    """Within its time."""
    connection = await opened()
    connection.listen(lambda _: None)
    server.keeps_open = True
    began = virtual_loop.time()
    await connection.close()
    assert CLOSE_TIMEOUT == pytest.approx(virtual_loop.time() - began)
    assert server.is_aborted


async def test_the_broker_closes(server: Server) -> None:
    """It gets its answer, and the listener the reason; what follows is not told."""
    connection = await opened()
    told: list[Any] = []
    connection.listen(told.append)
    why = p.PeerError(Symbol("amqp:internal-error"), "because")
    server.keeps_open = True
    server.say(pack(p.Close(why)) + pack(p.Begin(None, UInt(0), UInt(0), UInt(0))))
    server.hang_up()
    server.break_off()
    await asyncio.sleep(1)
    reason = "the broker ended the connection: amqp:internal-error: because"
    assert [Disconnected(reason, why)] == told
    assert 1 == len(sent(server, p.Close))


async def test_what_breaks_the_protocol_ends_the_connection(server: Server) -> None:
    """Records before it are handed out."""
    connection = await opened()
    told: list[Any] = []
    connection.listen(told.append)
    flow = p.Flow(UInt(0), UInt(0), UInt(0), UInt(0))
    server.say(pack(flow) + bytes(8))
    await asyncio.sleep(1)
    assert [ReceivedRecord(0, flow)] == told[:1]
    assert "the broker violated AMQP 1.0: a frame of 0 bytes" in told[1].reason
    assert server.is_aborted


async def test_events_before_the_first_listener_are_kept(server: Server) -> None:
    """In its order."""
    connection = await opened()
    flow = p.Flow(UInt(0), UInt(0), UInt(0), UInt(0))
    server.say(pack(flow))
    server.break_off(ConnectionResetError("reset"))
    await asyncio.sleep(1)
    told: list[Any] = []
    connection.listen(told.append)
    assert [ReceivedRecord(0, flow), Disconnected("reset")] == told


async def test_a_writer_waits_while_too_much_is_to_be_sent(server: Server) -> None:
    """Until it is sent, or the connection is no more."""
    connection = await opened()
    connection.listen(lambda _: None)
    await connection.drain()
    connection.pause_writing()
    connection.pause_writing()
    assert connection.is_clogged
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(1)
    assert not waiting.done()
    connection.resume_writing()
    await waiting
    assert not connection.is_clogged
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    server.break_off()
    await waiting
