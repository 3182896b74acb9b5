"""A session over AMQP 1.0 keeps its laws on a real RabbitMQ, also when something breaks."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from aio_pika_batch.adapters.amqp10.session import Amqp10Session
from aio_pika_batch.adapters.rabbitmq import Amqp10Transport
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.core.settlement import Disposition, Modification, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    SessionLost,
    SettlementError,
    TopologyError,
)
from aio_pika_batch.transport import Endpoint, Subscription
from tests.integration.helpers import parse_version, ready, until
from tests.integration.test_amqp10_contract import (
    everywhere,  # noqa: F401  -- for all that is in this file
    speaks_amqp10,  # noqa: F401
)
from tests.integration.test_tls import Secured, secured  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aio_pika.abc import AbstractChannel

    from aio_pika_batch.core.message import Message
    from tests.support.find import RunningBroker
    from tests.support.proxy import TcpProxy
    from tests.support.rabbitmq import RabbitMQ

QUORUM = {"x-queue-type": "quorum"}
STALL = 1.5


@pytest.fixture
async def queue(name: str, channel: AbstractChannel) -> AsyncIterator[str]:
    """A quorum queue with a dead-letter queue."""
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{name}-dead"}
    await channel.declare_queue(f"{name}-dead", durable=True, arguments=QUORUM)
    await channel.declare_queue(name, durable=True, arguments=QUORUM | dead)
    yield name
    await channel.queue_delete(name)
    await channel.queue_delete(f"{name}-dead")


@asynccontextmanager
async def consuming(
    url: str, queue: str, prefetch: int = 1000, endpoint: dict[str, Any] | None = None, **more: Any
) -> AsyncIterator[Amqp10Session]:
    """A session on the queue."""
    transport = Amqp10Transport(Endpoint(url=url, **endpoint or {}))
    subscription = Subscription(queue=queue, prefetch=prefetch, consumer_tag="c-1", **more)
    async with transport.session(subscription) as session:
        assert isinstance(session, Amqp10Session)
        yield session


async def publish(channel: AbstractChannel, queue: str, bodies: Sequence[bytes]) -> None:
    """Put messages into the queue, in this order."""
    await asyncio.gather(
        *(
            channel.default_exchange.publish(aio_pika.Message(body, delivery_mode=2), queue)
            for body in bodies
        )
    )


async def take(session: Amqp10Session, count: int) -> list[Message]:
    """Receive this many messages."""
    messages: list[Message] = []
    async with asyncio.timeout(30):
        while len(messages) < count:
            messages.extend(await anext(aiter(session)))
    return messages


def settled(disposition: Disposition, messages: Sequence[Message]) -> Settlement:
    """One disposition for some messages."""
    return Settlement(disposition, tuple(each.delivery_tag for each in messages))


def bodies(messages: Sequence[Message]) -> list[bytes]:
    """Return the bodies, which are unique."""
    return [message.body for message in messages]


# --- outcomes ------------------------------------------------------------------------


async def test_each_message_is_settled_as_was_decided(
    amqp_url: str, queue: str, channel: AbstractChannel, broker: RunningBroker
) -> None:
    """Four outcomes for 1000 messages, mixed, in few frames; nothing else is touched."""
    await publish(channel, queue, [b"%d" % number for number in range(1000)])
    kinds = [Disposition.ACK] * 7 + [Disposition.REJECT, Disposition.REQUEUE, Disposition.RETURN]
    async with consuming(amqp_url, queue) as session:
        messages = await take(session, 1000)
        assert sorted(bodies(messages), key=int) == bodies(messages)
        by_kind = {kind: messages[place::10] for place, kind in enumerate(kinds)}
        acked = [each for place in range(7) for each in messages[place::10]]
        by_kind[Disposition.ACK] = acked
        await session.settle([settled(kind, those) for kind, those in by_kind.items()])

        again = await take(session, 200)
        assert {each.body for each in again} == {
            *bodies(messages[8::10]),
            *bodies(messages[9::10]),
        }
        assert {True} == {each.redelivered for each in again}
        counted = {each.body: each.delivery_count for each in again}
        assert {1} == {counted[each.body] for each in messages[8::10]}
        spared = None if parse_version(broker) >= (4, 3) else 1
        assert {spared} == {counted[each.body] for each in messages[9::10]}
        await session.settle([settled(Disposition.ACK, again)])
        await session.settled()
        assert 0 == session.unproven
    assert 100 == await until(lambda: ready(amqp_url, f"{queue}-dead"))
    assert 0 == await ready(amqp_url, queue)


async def test_a_message_goes_back_with_headers_and_without_a_copy(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """Readers of both protocols see them; the rest of the message is as it was."""
    original = aio_pika.Message(b"one", headers={"x-retry-count": 1, "kept": [1]}, message_id="m")
    await channel.default_exchange.publish(original, queue)
    async with consuming(amqp_url, queue) as session:
        [message] = await take(session, 1)
        headers = {"x-retry-count": 2, "x-why": "because ü", "x-flag": True}
        await session.modify([Modification((message.delivery_tag,), headers=headers)])
        [again] = await take(session, 1)

        assert (2, "because ü", True) == tuple(again.headers[key] for key in headers)
        assert ("m", 2, True) == (again.message_id, again.retry_count, again.redelivered)
        assert 1 == again.delivery_count
        await session.settle([settled(Disposition.RETURN, [again])])
    got = await (await channel.get_queue(queue)).get()
    assert {"kept": [1], **headers}.items() <= got.headers.items()
    await got.ack()


async def test_a_message_is_dead_lettered_with_its_reason(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """By the queue itself."""
    await publish(channel, queue, [b"one"])
    async with consuming(amqp_url, queue) as session:
        [message] = await take(session, 1)
        why = {"x-dead-letter-reason": "rejected by the handler"}
        await session.modify(
            [Modification((message.delivery_tag,), failed=False, dead=True, headers=why)]
        )
        await session.settled()
    dead = await channel.get_queue(f"{queue}-dead")
    got = await until(lambda: dead.get(no_ack=True, fail=False))
    assert why.items() <= got.headers.items()
    assert "rejected" == got.headers["x-death"][0]["reason"]


async def test_a_header_that_others_could_not_read_is_refused_before_anything_is_sent(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """The message can be settled afterwards."""
    await publish(channel, queue, [b"one"])
    async with consuming(amqp_url, queue) as session:
        [message] = await take(session, 1)
        with pytest.raises(SettlementError, match="float"):
            await session.modify([Modification((message.delivery_tag,), headers={"x-f": 1.5})])
        await session.settle([settled(Disposition.ACK, [message])])
    assert 0 == await ready(amqp_url, queue)


async def test_a_message_comes_again_when_it_is_due(
    amqp_url: str, queue: str, channel: AbstractChannel, broker: RunningBroker
) -> None:
    """Each at its own time, in no queue but its own; before 4.3 it is refused."""
    await publish(channel, queue, [b"%d" % number for number in range(20)])
    async with consuming(amqp_url, queue) as session:
        messages = await take(session, 20)
        now = datetime.now(UTC)
        due = {
            each.body: now + timedelta(milliseconds=300 + 50 * int(each.body)) for each in messages
        }
        assert session.retries.delays == (parse_version(broker) >= (4, 3))
        delayed = [Modification((each.delivery_tag,), until=due[each.body]) for each in messages]
        if not session.retries.delays:
            with pytest.raises(SettlementError, match="cannot delay"):
                await session.modify(delayed)
            return
        await session.modify(delayed)
        early = []
        for _ in range(20):
            for each in await anext(aiter(session)):
                early.append((due[each.body] - datetime.now(UTC)).total_seconds())
                await session.settle([settled(Disposition.ACK, [each])])
            if len(early) == 20:
                break
        assert max(early) < 0.02
        assert min(early) > -5


# --- what was applied ----------------------------------------------------------------


def stall(rabbitmq: RabbitMQ, queue: str) -> None:
    """Let the queue's leader stand still."""
    rabbitmq.eval(
        f"P = whereis('%2F_{queue}'), sys:suspend(P),"
        f" spawn(fun() -> timer:sleep({int(STALL * 1000)}), sys:resume(P) end)."
    )


@pytest.mark.needs_node
async def test_settled_returns_when_the_queue_has_applied_all(
    amqp_url: str, queue: str, channel: AbstractChannel, rabbitmq: RabbitMQ, proxy: TcpProxy
) -> None:
    """A queue that stands still is waited for; after that a broken line brings nothing back."""
    await publish(channel, queue, [b"x"] * 200)
    async with consuming(proxy.url(amqp_url), queue) as session:
        messages = await take(session, 200)
        await asyncio.to_thread(stall, rabbitmq, queue)
        began = time.monotonic()
        for message in messages:
            await session.settle([settled(Disposition.ACK, [message])])
        assert 200 == session.unproven
        await session.settled()
        assert time.monotonic() - began > STALL * 0.4
        assert 0 == session.unproven
        proxy.cut()
        await loss(session)
    await asyncio.sleep(0.5)
    assert 0 == await ready(amqp_url, queue)


@pytest.mark.needs_node
async def test_leaving_waits_until_the_queue_has_applied_all(
    amqp_url: str, queue: str, channel: AbstractChannel, rabbitmq: RabbitMQ
) -> None:
    """So that a graceful stop brings nothing back."""
    await publish(channel, queue, [b"x"] * 200)
    async with consuming(amqp_url, queue) as session:
        messages = await take(session, 200)
        await asyncio.to_thread(stall, rabbitmq, queue)
        for message in messages:
            await session.settle([settled(Disposition.ACK, [message])])
    assert 0 == session.unproven
    await asyncio.sleep(STALL + 0.5)
    assert 0 == await ready(amqp_url, queue)


@pytest.mark.needs_node
async def test_leaving_ends_in_time_and_reports_unconfirmed_settlements(
    amqp_url: str, queue: str, channel: AbstractChannel, rabbitmq: RabbitMQ, proxy: TcpProxy
) -> None:
    """A broker that does not answer is not waited for without an end."""
    await publish(channel, queue, [b"x"] * 10)
    async with consuming(proxy.url(amqp_url), queue) as session:
        messages = await take(session, 10)
        proxy.freeze()
        await session.settle([settled(Disposition.ACK, messages)])
        began = time.monotonic()
    assert 4 < time.monotonic() - began < 15
    assert 10 == session.unproven


# --- prefetch and large messages --------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 7, 300, 10_000, 0])
async def test_no_more_than_the_prefetch_is_unsettled(
    amqp_url: str, queue: str, channel: AbstractChannel, prefetch: int
) -> None:
    """However the batches are cut, and nothing stands still."""
    count = max(1000, prefetch + 500)
    await publish(channel, queue, [b"%d" % number for number in range(count)])
    held: list[Message] = []
    seen = 0
    async with consuming(amqp_url, queue, prefetch) as session, asyncio.timeout(60):
        async for chunk in session:
            held.extend(chunk)
            seen += len(chunk)
            assert prefetch == 0 or len(held) <= prefetch
            if seen == count or len(held) == prefetch or prefetch == 0:
                await session.settle([settled(Disposition.ACK, held)])
                held = []
            if seen == count:
                break
    assert 0 == await ready(amqp_url, queue)


async def test_a_large_message_comes_in_many_frames(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """And its neighbours come in order."""
    large = bytes(range(256)) * 60_000
    await publish(channel, queue, [b"before", large, b"after"])
    async with consuming(amqp_url, queue, 2) as session:
        first, second = await take(session, 2)
        await session.settle([settled(Disposition.ACK, [first])])
        [third] = await take(session, 1)
        assert [b"before", large, b"after"] == bodies([first, second, third])
        await session.settle([settled(Disposition.ACK, [second, third])])
    assert 0 == await ready(amqp_url, queue)


async def test_a_consumer_can_have_priority(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """As over 0-9-1."""
    async with (
        consuming(amqp_url, queue) as low,
        consuming(amqp_url, queue, arguments={"x-priority": 5}) as high,
    ):
        await publish(channel, queue, [b"x"] * 10)
        await high.settle([settled(Disposition.ACK, await take(high, 10))])
        assert [] == low._pending


# --- refusals ----------------------------------------------------------------------------


async def refusal(kind: type[Exception], url: str, queue: str = "q", **more: Any) -> str:
    """Return the error of a session that can't be opened."""
    with pytest.raises(kind) as caught:
        async with consuming(url, queue, endpoint=more):
            pass
    return str(caught.value)


async def test_each_refusal_says_what_to_do(amqp_url: str, name: str) -> None:
    """Without the password; and one broker of several is enough."""
    nowhere = "amqp://guest:guest@127.0.0.1:1/"
    assert "nothing listens there" in await refusal(BrokerUnavailable, nowhere)
    wrong = amqp_url.replace("guest:guest", "guest:secret")
    text = await refusal(AccessRefused, wrong)
    assert "check user and password" in text
    assert "secret" not in text
    text = await refusal(BrokerUnavailable, f"{amqp_url.rstrip('/')}/no-such-vhost")
    assert "check that the virtual host 'no-such-vhost' exists" in text
    text = await refusal(TopologyError, amqp_url, f"{name} ü/%")
    assert f"queue '{name} ü/%'" in text
    assert "create it, or let the consumer declare it" in text
    external = f"{amqp_url}?auth=external"
    assert "does not offer to log in by auth=external" in await refusal(AccessRefused, external)
    unknown = "amqp://guest:guest@no-such-host.invalid/"
    assert "no-such-host.invalid" in await refusal(Exception, unknown)
    several = f"{nowhere},{wrong}"
    assert "no address can be used" in await refusal(AccessRefused, several)


async def test_one_broker_of_several_is_enough(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """Whichever comes first."""
    await publish(channel, queue, [b"x"])
    for _ in range(3):
        async with consuming(f"amqp://guest:guest@127.0.0.1:1/,{amqp_url}", queue) as session:
            await session.settle([settled(Disposition.RETURN, await take(session, 1))])


async def test_a_name_of_other_letters_is_found(amqp_url: str, channel: AbstractChannel) -> None:
    """It is quoted in the address; pamqp declares none with others."""
    for queue in ("a/b:c@d#e,f", "q" * 255):
        await channel.queue_delete(queue)
        await channel.declare_queue(queue, durable=True, arguments=QUORUM)
        await publish(channel, queue, [b"x"])
        async with consuming(amqp_url, queue) as session:
            [message] = await take(session, 1)
            assert queue == message.routing_key
            await session.settle([settled(Disposition.ACK, [message])])
        await channel.queue_delete(queue)


async def test_a_peer_that_says_nothing_is_not_waited_for(amqp_url: str, proxy: TcpProxy) -> None:
    """Longer than `connect_timeout`."""
    proxy.freeze()
    text = await refusal(BrokerUnavailable, proxy.url(amqp_url), connect_timeout=0.5)
    assert "no answer within 0.5 s" in text


@pytest.mark.long
@pytest.mark.needs_node
async def test_tls_and_certificates_work_as_over_091(
    secured: Secured,  # noqa: F811
    name: str,
) -> None:
    """With a client certificate, logging in by it, and each refusal."""
    file = secured.certificates.file
    trusted = {"ssl_cafile": file("ca.pem")}
    client = {"ssl_certfile": file("client.pem"), "ssl_keyfile": file("client.key")}
    url = secured.url()
    arguments = QUORUM
    async with await aio_pika.connect(secured.node.url) as connection:
        await (await connection.channel()).declare_queue(name, durable=True, arguments=arguments)
        for place, options in (
            (url, trusted),
            (secured.url(strict=True), trusted | client),
            (
                url.replace("guest:guest@", "nobody:wrong@") + "?auth=external",
                trusted | client,
            ),
        ):
            async with consuming(place, name, endpoint=options):
                pass
    forged = {"ssl_certfile": file("forged-client.pem"), "ssl_keyfile": file("forged-client.key")}
    for place, options, advice in (
        (url, {}, "set ssl_cafile to the authority that signed it"),
        (secured.url(host="127.0.0.1"), trusted, "connect by a name that"),
        (secured.url(strict=True), trusted, "may want a client certificate"),
        (secured.url(strict=True), trusted | forged, "does not accept the client certificate"),
        (secured.node.url.replace("amqp:", "amqps:"), trusted, "does not speak TLS"),
    ):
        assert advice in await refusal(AccessRefused, place, name, **options)


# --- losses ------------------------------------------------------------------------------


async def loss(session: Amqp10Session) -> str:
    """Return the error of the session when it is lost."""

    async def to_the_end() -> None:
        async with asyncio.timeout(30):
            async for _ in session:
                pass

    with pytest.raises(SessionLost) as caught:
        await to_the_end()
    with pytest.raises(SessionLost):
        await session.settle([])
    return str(caught.value)


async def test_a_deleted_queue_ends_the_session(
    amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """With the reason."""
    async with consuming(amqp_url, queue) as session:
        await channel.queue_delete(queue)
        assert "the queue was deleted" in await loss(session)


async def test_a_silent_broker_is_dead_after_three_heartbeats(
    amqp_url: str, queue: str, proxy: TcpProxy
) -> None:
    """And one that is only idle is not."""
    async with consuming(proxy.url(amqp_url), queue, endpoint={"heartbeat": 1}) as session:
        waiting = asyncio.create_task(loss(session))
        await asyncio.sleep(4)
        assert not waiting.done()
        proxy.freeze()
        assert "the broker has sent nothing for 3 s" in await waiting


@pytest.mark.needs_node
async def test_an_operator_closes_the_connection(
    amqp_url: str, name: str, rabbitmq: RabbitMQ
) -> None:
    """In the operator's words; what was unsettled comes again."""
    transport = Amqp10Transport(Endpoint(url=amqp_url))
    await transport.declare(Topology(queues=(Queue(name, arguments=QUORUM),)))
    async with transport.publisher() as publisher:
        await publisher.publish([Publication(b"x", routing_key=name)])
    async with consuming(amqp_url, name) as session:
        await take(session, 1)
        await asyncio.to_thread(rabbitmq.close_all_connections, "because of this")
        text = await loss(session)
        assert "Connection forced" in text
        assert "because of this" in text
        assert session.crashed_on is None
    async with consuming(amqp_url, name) as session:
        [again] = await take(session, 1)
        assert again.redelivered
        await session.settle([settled(Disposition.ACK, [again])])


@pytest.mark.needs_node
async def test_a_memory_alarm_stops_nothing(
    amqp_url: str, queue: str, channel: AbstractChannel, rabbitmq: RabbitMQ
) -> None:
    """It is about publishers."""
    await publish(channel, queue, [b"%d" % number for number in range(100)])
    async with consuming(amqp_url, queue, 10) as session:
        first = await take(session, 10)
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        await session.settle([settled(Disposition.ACK, first)])
        for _ in range(9):
            await session.settle([settled(Disposition.ACK, await take(session, 10))])
        await session.settled()
        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
    async with consuming(amqp_url, queue) as session, asyncio.timeout(30):
        await session.cancel()


async def test_what_is_held_too_long_comes_again(
    amqp_url: str, name: str, channel: AbstractChannel, broker: RunningBroker
) -> None:
    """The session goes on, and what is still decided about it is dropped."""
    if parse_version(broker) < (4, 3):
        pytest.skip("before RabbitMQ 4.3 consumers over AMQP 1.0 have no timeout")
    arguments = QUORUM | {"x-consumer-timeout": 1000}
    await channel.declare_queue(name, durable=True, arguments=arguments)
    await publish(channel, name, [b"a", b"b"])
    async with consuming(amqp_url, name) as session:
        held = await take(session, 2)
        async with asyncio.timeout(120):
            again = await take(session, 2)
        assert bodies(held) == bodies(again)
        await session.settle([settled(Disposition.ACK, held)])
        await session.settle([settled(Disposition.ACK, again)])
        await session.settled()
    assert 0 == await ready(amqp_url, name)
    await channel.queue_delete(name)


async def test_a_message_that_the_broker_cannot_translate_is_suspected(
    amqp_url: str, name: str, channel: AbstractChannel
) -> None:
    """It ends the broker's session: the next one should use 0-9-1."""
    arguments = QUORUM | {"x-delivery-limit": -1}
    await channel.declare_queue(name, durable=True, arguments=arguments)
    poison = aio_pika.Message(b"not of that type", type="amqp-1.0")
    await channel.default_exchange.publish(poison, name)
    async with consuming(amqp_url, name) as session:
        await loss(session)
        assert session.crashed_on is not None
    await channel.queue_delete(name)
