"""Errors of connecting and declaring say what is wrong, where, and what to do."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import aio_pika
import pytest

from aio_pika_batch.adapters.rabbitmq import AioPikaTransport, open_transport
from aio_pika_batch.cli.check import clock_difference
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Binding, Exchange, PublishCheck, Queue, Topology
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TopologyError,
    TransportError,
)
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from aio_pika_batch.transport import Endpoint, Subscription, VersionedTransport, Wire
from tests.integration.helpers import PATIENCE, SLACK, add_user, allow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aio_pika.abc import AbstractChannel

    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
    from tests.support.find import RunningBroker
    from tests.support.proxy import TcpProxy


def changed(amqp_url: str, **parts: Any) -> str:
    """Return *amqp_url* with another user, password, host, port or path."""
    was = urlsplit(amqp_url)
    user = parts.get("user", was.username)
    password = parts.get("password", was.password)
    host, port = parts.get("host", was.hostname), parts.get("port", was.port)
    return f"amqp://{user}:{password}@{host}:{port}{parts.get('path', was.path)}"


async def connect(url: str, **more: Any) -> None:
    """Open a connection and close it."""
    async with open_transport(Endpoint(url=url, **more)).publisher():
        pass


async def refusal(url: str, kind: type[TransportError], **more: Any) -> str:
    """Try to connect; return the error's text."""
    with pytest.raises(kind) as caught:
        await connect(url, **more)
    assert type(caught.value) is kind
    return str(caught.value)


# --- connecting ------------------------------------------------------------------


async def test_a_wrong_password_is_refused(amqp_url: str) -> None:
    """The error names the user and the address, and never the password."""
    text = await refusal(changed(amqp_url, password="wr0ng"), AccessRefused)

    assert "403 ACCESS_REFUSED" in text
    assert "check user and password" in text
    assert "wr0ng" not in text


async def test_a_missing_virtual_host_is_refused(amqp_url: str) -> None:
    """With the broker's reason."""
    text = await refusal(changed(amqp_url, path="/no%2Fsuch"), AccessRefused)

    assert "530 NOT_ALLOWED - vhost no/such not found" in text
    assert "check the virtual host 'no/such'" in text


async def test_a_port_without_a_listener_is_unavailable() -> None:
    """The connection is refused."""
    port = free_port()

    assert f"amqp://{LOCALHOST}:{port}/ cannot be reached: nothing listens" in await refusal(
        f"amqp://{LOCALHOST}:{port}", BrokerUnavailable
    )


async def test_an_unknown_host_name_is_refused(no_such_host: str) -> None:
    """No resolver knows the name."""
    assert "its name is not known" in await refusal(f"amqp://{no_such_host}", AccessRefused)


async def test_a_broker_that_never_answers_times_out(amqp_url: str, proxy: TcpProxy) -> None:
    """The socket opens, and nothing is received."""
    proxy.freeze()
    start = time.monotonic()

    assert "no answer within 0.5 s" in await refusal(
        proxy.url(amqp_url), BrokerUnavailable, connect_timeout=0.5
    )
    assert time.monotonic() - start < SLACK


async def test_connecting_can_be_cancelled(amqp_url: str, proxy: TcpProxy) -> None:
    """At once, and nothing is left open."""
    proxy.freeze()
    connecting = asyncio.create_task(connect(proxy.url(amqp_url)))
    await asyncio.sleep(0.2)
    connecting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await connecting


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        b"AMQP\x01\x01\x00\x0a",
        b"\x15\x03\x03\x00\x02\x02\x28",
    ],
)
async def test_another_server_on_the_port_is_unavailable(answer: bytes) -> None:
    """It speaks another protocol, another version, or nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, LOCALHOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "cannot be reached" in await refusal(f"amqp://{LOCALHOST}:{port}", BrokerUnavailable)


async def test_a_login_mechanism_that_is_not_offered_is_refused(amqp_url: str) -> None:
    """It needs a plugin, which is not enabled here."""
    text = await refusal(f"{amqp_url}?auth=external", AccessRefused)
    assert "does not offer to log in by auth=external" in text


async def test_one_of_several_hosts_is_enough(amqp_url: str) -> None:
    """In any order."""
    there = urlsplit(amqp_url).port
    for _ in range(5):
        await connect(changed(amqp_url, port=f"{free_port()},{LOCALHOST}:{there}"))


async def test_if_no_host_can_be_used_all_are_named(amqp_url: str) -> None:
    """A refusal outweighs an unavailable host, because it has to be fixed."""
    wrong, dead = changed(amqp_url, password="wr0ng"), f"amqp://{LOCALHOST}:{free_port()}"

    text = await refusal(f"{wrong},{dead}", AccessRefused)
    assert "check user" in text
    assert "nothing listens" in text
    assert await refusal(f"{dead},{dead}", BrokerUnavailable)


@pytest.mark.parametrize(
    "wrong", [{"url": "http://h"}, {"url": "amqp://h", "ssl_cafile": "/no/such"}]
)
async def test_an_invalid_url_is_refused_at_once(wrong: dict[str, str]) -> None:
    """Before anything is connected."""
    with pytest.raises(ConfigurationError):
        open_transport(Endpoint(**wrong))


async def test_the_connection_has_a_name_and_a_heartbeat(amqp_url: str, wire: Wire) -> None:
    """From the settings or from the URL, which takes precedence."""
    for url, name in ((amqp_url, "mine"), (f"{amqp_url}?name=theirs&heartbeat=7", "theirs")):
        transport = AioPikaTransport(
            Endpoint(url=url, connection_name="mine", heartbeat=5, wire=wire)
        )
        async with transport.publisher() as publisher:
            below = publisher._connection.connection.transport.connection
            assert (7 if name == "theirs" else 5) == below.connection_tune.heartbeat
            assert {"connection_name": name} == publisher._connection.connection.kwargs[
                "client_properties"
            ]


# --- TLS -------------------------------------------------------------------------


@pytest.fixture
async def tls(amqp_url: str, tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    """A TLS proxy before the broker: its URL, and its authority."""
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    await asyncio.to_thread(
        subprocess.run,
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    where = urlsplit(amqp_url)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection(where.hostname, where.port)
        await asyncio.gather(
            pump(reader, broker_writer), pump(broker_reader, writer), return_exceptions=True
        )

    server = await asyncio.start_server(serve, LOCALHOST, 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        url = changed(amqp_url, host="localhost", port=port).replace("amqp://", "amqps://")
        yield url, certificate


async def test_tls(tls: tuple[str, str], name: str) -> None:
    """With the authority in the settings or in the URL, messages travel in both directions."""
    url, authority = tls
    for endpoint in (
        Endpoint(url=url, ssl_cafile=authority),
        Endpoint(url=f"{url}?cafile={authority}"),
    ):
        transport = AioPikaTransport(endpoint)
        queue = Queue(name, durable=False, exclusive=True)
        own = Topology(queues=(queue,))
        subscription = Subscription(queue=name, prefetch=9, consumer_tag="c", own=own)
        async with (
            transport.session(subscription) as session,
            transport.publisher() as publisher,
        ):
            assert [Outcome.CONFIRMED] * 9 == await publisher.publish(
                [Publication(bytes(50_000), routing_key=name)] * 9
            )
            async with asyncio.timeout(PATIENCE):
                assert bytes(50_000) == (await anext(aiter(session)))[0].body


async def test_a_certificate_is_verified(tls: tuple[str, str]) -> None:
    """Unless the URL says not to."""
    url, authority = tls

    text = await refusal(url, AccessRefused)
    assert "does not verify" in text
    assert "ssl_cafile" in text
    assert "does not verify" in await refusal(
        url.replace("localhost", LOCALHOST), AccessRefused, ssl_cafile=authority
    )
    await connect(f"{url}?no_verify_ssl=1")


async def test_tls_to_a_port_without_tls_is_refused(amqp_url: str) -> None:
    """The broker answers the handshake with the header of its protocol."""
    text = await refusal(amqp_url.replace("amqp://", "amqps://"), AccessRefused)

    assert "does not speak TLS" in text


async def test_no_tls_to_a_port_with_tls_is_unavailable(tls: tuple[str, str]) -> None:
    """The server closes the connection, or answers with a TLS alert."""
    url, _ = tls

    assert "cannot be reached" in await refusal(
        url.replace("amqps://", "amqp://"), BrokerUnavailable, connect_timeout=3
    )


# --- declaring -------------------------------------------------------------------


@pytest.fixture
def transport(amqp_url: str, wire: Wire) -> AioPikaTransport:
    """The adapter, on either wire."""
    return AioPikaTransport(Endpoint(url=amqp_url, wire=wire))


async def test_declaring_makes_messages_arrive(
    transport: AioPikaTransport, name: str, channel: AbstractChannel
) -> None:
    """Exchange, queue and binding. Declaring twice changes nothing."""
    topology = Topology(
        (Exchange(""), Exchange(name, "topic", arguments={"alternate-exchange": "amq.fanout"})),
        (Queue(name, arguments={"x-max-length": 10, "x-queue-type": "quorum"}),),
        (
            Binding(name, name, "a.*"),
            Binding(name, "amq.headers", arguments={"x-match": "all", "kind": "b"}),
            Binding(name, ""),
        ),
    )

    await transport.declare(topology)
    await transport.declare(topology)

    async with transport.publisher() as publisher:
        outcomes = await publisher.publish(
            [
                Publication(b"", exchange=name, routing_key="a.b"),
                Publication(b"", exchange="amq.headers", headers={"kind": "b"}),
                Publication(b"", exchange="amq.headers", headers={"kind": "c"}),
            ]
        )
    assert [Outcome.CONFIRMED, Outcome.CONFIRMED, Outcome.RETURNED] == outcomes
    await channel.queue_delete(name)
    await channel.exchange_delete(name)


async def test_the_version_is_known_after_declaring(
    transport: AioPikaTransport, name: str, channel: AbstractChannel, broker: RunningBroker
) -> None:
    """And not before."""
    assert isinstance(transport, VersionedTransport)
    assert transport.broker_version is None

    await transport.declare(Topology(queues=(Queue(name),)))

    assert transport.broker_version is not None
    assert broker.version == ".".join(map(str, transport.broker_version))
    await channel.queue_delete(name)


@pytest.fixture
async def there(channel: AbstractChannel, name: str) -> AsyncIterator[str]:
    """A queue and an exchange of the same name, with unusual arguments."""
    await channel.declare_queue(name, durable=True, arguments={"x-max-length": 7})
    await channel.declare_exchange(name, "topic", durable=True)
    yield name
    await channel.queue_delete(name)
    await channel.exchange_delete(name)


async def refused(transport: AioPikaTransport, topology: Topology) -> str:
    """Declare; return the error's text."""
    with pytest.raises(TopologyError) as caught:
        await transport.declare(topology)
    return str(caught.value)


async def test_unequal_queue_arguments_are_an_error(
    transport: AioPikaTransport, there: str
) -> None:
    """With the queue, the broker's reason, and the fix."""
    text = await refused(transport, Topology(queues=(Queue(there, arguments={"x-max-length": 8}),)))

    assert f"queue '{there}' at amqp://" in text
    assert "406 PRECONDITION_FAILED - inequivalent arg 'x-max-length'" in text
    assert "change the settings" in text


async def test_another_exchange_type_is_an_error(transport: AioPikaTransport, there: str) -> None:
    """As for a queue."""
    text = await refused(transport, Topology(exchanges=(Exchange(there, "direct"),)))

    assert f"exchange '{there}'" in text
    assert "406 PRECONDITION_FAILED - inequivalent arg 'type'" in text


async def test_an_unknown_exchange_type_is_an_error(transport: AioPikaTransport, name: str) -> None:
    """Even with versions that close the connection over it."""
    text = await refused(transport, Topology(exchanges=(Exchange(name, "x-no-such"),)))

    assert "exchange type 'x-no-such'" in text
    assert "plugin" in text


async def test_existing_first_accepts_what_exists(transport: AioPikaTransport, there: str) -> None:
    """Of any kind. It creates what is missing, on a new connection."""
    new = f"{there}-new"
    await transport.declare(
        Topology(
            (
                Exchange(there, "fanout", existing_first=True),
                Exchange(new, "fanout", existing_first=True),
            ),
            (Queue(there, existing_first=True), Queue(new, existing_first=True)),
            (Binding(new, new),),
        )
    )

    async with transport.publisher() as publisher:
        assert [Outcome.CONFIRMED] == await publisher.publish([Publication(b"", exchange=new)])
        channel = await publisher._connection.connection.channel()
        await channel.queue_delete(new)
        await channel.exchange_delete(new)


async def test_check_only_creates_nothing(transport: AioPikaTransport, there: str) -> None:
    """What exists is accepted, and what is missing is an error."""
    await transport.declare(
        Topology((Exchange(there, check_only=True),), (Queue(there, check_only=True),))
    )
    for missing in (
        Topology(queues=(Queue(f"{there}-no", check_only=True),)),
        Topology(exchanges=(Exchange(f"{there}-no", check_only=True),)),
        Topology(bindings=(Binding(there, f"{there}-no"),)),
    ):
        text = await refused(transport, missing)
        assert "404 NOT_FOUND" in text
        assert f"'{there}-no'" in text
        assert "create it" in text


async def test_streams_are_refused(
    transport: AioPikaTransport, channel: AbstractChannel, name: str, broker: RunningBroker
) -> None:
    """When declared, and when consumed. Before 3.9 there are none."""
    stream = {"x-queue-type": "stream"}
    assert "stream" in await refused(transport, Topology(queues=(Queue(name, arguments=stream),)))

    if broker.version.startswith("3.8"):
        return
    await channel.declare_queue(name, durable=True, arguments=stream)
    await channel.default_exchange.publish(aio_pika.Message(b""), name)
    subscription = Subscription(
        queue=name, prefetch=9, consumer_tag="c", arguments={"x-stream-offset": "first"}
    )
    async with transport.session(subscription) as session:
        with pytest.raises(TopologyError, match="is a stream"):
            async with asyncio.timeout(PATIENCE):
                await anext(aiter(session))
    # Without an offset the consumer itself is refused.
    with pytest.raises(TopologyError, match="is a stream"):
        async with transport.session(replace(subscription, arguments={})):
            pass
    await channel.queue_delete(name)


async def test_the_type_of_an_exchange_is_found(transport: AioPikaTransport, there: str) -> None:
    """Whatever it is taken for. A missing one is not created."""
    for kind in ("topic", "fanout"):
        assert "topic" == await transport.exchange_type(Exchange(there, kind))
        assert "topic" == await transport.exchange_type(Exchange(there, kind, durable=False))
    assert None is await transport.exchange_type(Exchange(f"{there}-no", "topic"))
    assert "404 NOT_FOUND" in await refused(
        transport, Topology(exchanges=(Exchange(f"{there}-no", check_only=True),))
    )


async def test_an_internal_exchange_cannot_be_published_to(
    transport: AioPikaTransport, channel: AbstractChannel, name: str
) -> None:
    """Which is found without a message."""
    await transport.declare(Topology(exchanges=(Exchange(name, "fanout", internal=True),)))

    text = await refused(transport, Topology(publishes=(PublishCheck(name, ""),)))

    assert f"publishing to exchange '{name}' at amqp://" in text
    assert "is not internal" in text
    await channel.exchange_delete(name)


async def test_an_exclusive_queue_lives_with_its_session(
    transport: AioPikaTransport, name: str
) -> None:
    """On a connection of its own, it would be deleted before it is consumed."""
    own = Topology(
        queues=(Queue(name, durable=False, exclusive=True),),
        bindings=(Binding(name, "amq.direct", name),),
    )
    subscription = Subscription(queue=name, prefetch=9, consumer_tag="c", own=own)
    for _ in range(2):
        async with transport.session(subscription) as session, transport.publisher() as publisher:
            there = Publication(b"", exchange="amq.direct", routing_key=name)
            assert [Outcome.CONFIRMED] == await publisher.publish([there])
            async with asyncio.timeout(PATIENCE):
                assert 1 == len(await anext(aiter(session)))
            with pytest.raises(TopologyError, match=r"405 RESOURCE_LOCKED.*another connection"):
                async with transport.session(subscription):
                    pass


@pytest.mark.needs_node
async def test_a_user_without_permissions_is_refused(
    amqp_url: str, rabbitmq: RabbitMQ, name: str, wire: Wire
) -> None:
    """When connecting, and when declaring."""
    await asyncio.to_thread(add_user, rabbitmq, name, "pass")
    url = changed(amqp_url, user=name, password="pass")
    assert "give the user permissions in the virtual host '/'" in await refusal(url, AccessRefused)

    await asyncio.to_thread(allow, rabbitmq, name, "", "", "")
    transport = AioPikaTransport(Endpoint(url=url, wire=wire))
    text = await refused(transport, Topology(queues=(Queue(name),)))
    assert "403 ACCESS_REFUSED" in text
    assert "permission" in text
    async with transport.publisher() as publisher:
        outcomes = await publisher.publish(
            [
                Publication(b"", exchange="amq.topic", routing_key="k"),
                Publication(b"", exchange="amq.topic"),
            ]
        )
    assert [Outcome.REFUSED] * 2 == outcomes


# --- names -----------------------------------------------------------------------

_LETTERS = "aZ9-_.:@#,/+ äßЖ中😀\"'%\\*?&=;|<>[]{}()~^`$!\t\u200b\u202e"


def any_name(seed: int, longest: int) -> str:
    """Return a name that RabbitMQ accepts, different for each seed.

    Half of it is drawn from letters that mean something in a URL, a pattern or a shell, and half
    from all of Unicode, control characters included. Line breaks are refused by the settings, NUL
    and surrogates by AMQP.
    """
    drawn = random.Random(seed)

    def letter() -> str:
        if drawn.random() < 0.5:
            return drawn.choice(_LETTERS)
        planes = [(1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
        return chr(drawn.randint(*drawn.choice(planes))).replace("\n", "n").replace("\r", "r")

    return f"{seed}{''.join(letter() for _ in range(drawn.randint(1, longest // 4)))}"


@pytest.mark.parametrize("wire", ["fast", "plain"])
async def test_queues_and_exchanges_of_any_name_are_used(
    amqp_url: str, channel: AbstractChannel, name: str, wire: Wire
) -> None:
    """40 names of each, judged by a channel of aio-pika, which checks no name when it publishes."""
    exchange = f"{name}-ä\"'"
    names = [f"{name[-8:]}{any_name(seed, 200)}" for seed in range(40)]
    expires = {"x-expires": 120_000}  # no client library can delete them
    transport = open_transport(Endpoint(url=amqp_url, wire=wire))
    await transport.declare(
        Topology(
            exchanges=(Exchange(exchange, "topic", durable=True, auto_delete=True),),
            queues=tuple(Queue(each, durable=True, arguments=expires) for each in names),
            bindings=tuple(Binding(each, exchange, f"key.{each}") for each in names),
        )
    )
    for each in names:
        await channel.default_exchange.publish(aio_pika.Message(each.encode()), each)
    for each in names:
        subscription = Subscription(queue=each, consumer_tag=f"ctag-{each[:20]}", prefetch=10)
        async with asyncio.timeout(PATIENCE), transport.session(subscription) as session:
            [message] = await anext(aiter(session))
            assert each.encode() == message.body
            await session.settle([Settlement(Disposition.ACK, (message.delivery_tag,))])
            await session.cancel()
    if wire == "fast":  # aiormq publishes to no such exchange
        routed = [Publication(b"", exchange=exchange, routing_key=f"key.{each}") for each in names]
        async with transport.publisher() as publisher:
            assert {Outcome.CONFIRMED} == set(await publisher.publish(routed))


@pytest.mark.long
@pytest.mark.needs_node
async def test_users_and_virtual_hosts_of_any_name_are_reached(
    rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    """40 of them: each queue is declared in its own virtual host, as the node itself sees it."""
    vhosts = ["..", ".", "team/../b", "./x", "x/..", *(any_name(seed, 120) for seed in range(35))]
    users = [f"user-ä@:/{number}" for number in range(len(vhosts))]
    passwords = [any_name(100 + number, 60) for number in range(len(vhosts))]
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    definitions = {
        "vhosts": [{"name": each} for each in vhosts],
        "users": [
            {"name": user, "password": password, "tags": ""}
            for user, password in zip(users, passwords, strict=True)
        ],
        "permissions": [
            {"user": user, "vhost": vhost, **everything}
            for user, vhost in zip(users, vhosts, strict=True)
        ],
    }
    file = tmp_path / "definitions.json"
    file.write_text(json.dumps(definitions))
    file.chmod(0o644)
    rabbitmq.rabbitmqctl("import_definitions", str(file))
    for number, (vhost, user, password) in enumerate(zip(vhosts, users, passwords, strict=True)):
        own = {"user": quote(user, safe=""), "password": quote(password, safe="")}
        url = changed(rabbitmq.url, **own, path=f"/{quote(vhost, safe='')}")
        await open_transport(Endpoint(url=url)).declare(Topology(queues=(Queue(f"q{number}"),)))
    found = rabbitmq.rabbitmqctl(
        "eval",
        '[io:format("~w ~s~n", [binary_to_list(V), N])'
        " || {resource, V, queue, N} <- rabbit_amqqueue:list_names()].",
    )
    wanted = {
        f"[{','.join(map(str, vhost.encode()))}] q{number}" for number, vhost in enumerate(vhosts)
    }
    assert wanted <= set(found.splitlines())


async def test_the_clocks_of_this_machine_and_its_broker_are_the_same(amqp_url) -> None:
    """A dead letter tells the broker's time. Its fraction of a second is missing."""
    difference = await clock_difference(open_transport(Endpoint(url=amqp_url)))
    assert difference is not None
    assert abs(difference) < 1
