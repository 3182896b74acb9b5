"""What a user reads if settings and broker do not match: one error, soon, that helps."""

from __future__ import annotations

import asyncio
import json

import aio_pika
import pytest
from yarl import URL

from aio_pika_batch import (
    AccessRefused,
    BatchConsumer,
    BatchConsumerSettings,
    ConfigurationError,
    MessageResult,
    TopologyError,
    TransportError,
)
from tests.integration.helpers import (
    PATIENCE,
    PROPERTIES,
    SLACK,
    RawClient,
    Recorder,
    Stopwatch,
    add_user,
    declare_dead_letters,
    holds,
    long,
    pack_properties,
    pack_table,
    publish,
    short,
    take_all,
    until,
)


class Acking(BatchConsumer):
    """Never gets any message."""

    async def process_messages(self, messages):
        for _ in messages:
            yield MessageResult.ACK


async def refusal(error: type[TransportError], **settings) -> str:
    """Return the text of the error that `start` and `run` raise within seconds."""
    settings = {"batch_timeout": 0.05, "reconnect_delay": 0.1, **settings}
    texts = []
    for way in ("start", "run"):
        consumer = Acking(BatchConsumerSettings(**settings))
        watch = Stopwatch()
        with pytest.raises(error) as caught:
            await asyncio.wait_for(getattr(consumer, way)(), PATIENCE)
        assert watch.seconds < SLACK
        assert not consumer.is_running
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "secret" not in texts[0]
    return texts[0]


# --- the way in -------------------------------------------------------------------


async def test_a_wrong_password(amqp_url, name) -> None:
    """It names the user, never the password."""
    url = str(URL(amqp_url).with_user("guest").with_password("secret"))
    text = await refusal(AccessRefused, url=url, queue_name=name)
    assert "'guest'" in text
    assert "check user and password" in text


async def test_a_missing_virtual_host(amqp_url, name) -> None:
    """It names the virtual host."""
    text = await refusal(AccessRefused, url=f"{amqp_url}nowhere", queue_name=name)
    assert "'nowhere'" in text
    assert "virtual host" in text


async def test_an_unknown_host(name, no_such_host) -> None:
    """It names the host and the setting: a wrong name is not waited for."""
    text = await refusal(AccessRefused, url=f"amqp://guest:secret@{no_such_host}/", queue_name=name)
    assert f"host '{no_such_host}' in url" in text


async def test_one_unknown_host_among_hosts_that_are_down(
    amqp_url, name, proxy, no_such_host
) -> None:
    """Those are waited for."""
    await proxy.refuse()
    url = f"{proxy.url(amqp_url)},amqp://{no_such_host}/"
    consumer = Acking(BatchConsumerSettings(url=url, queue_name=name, reconnect_delay=0.1))
    starting = asyncio.ensure_future(consumer.start())
    await until(lambda: consumer.status().workers and consumer.status().workers[0].last_error)
    assert not starting.done()
    await proxy.refuse(False)
    await asyncio.wait_for(starting, PATIENCE)
    await consumer.stop()


# --- what is there already, and otherwise -------------------------------------------


@pytest.mark.parametrize(
    ("there", "settings", "word"),
    [
        ({"durable": False}, {}, "durable"),
        ({"durable": True, "auto_delete": True}, {}, "auto_delete"),
        ({"durable": True}, {"queue_arguments": {"x-max-length": 5}}, "x-max-length"),
        (
            {"durable": True, "arguments": {"x-max-length": 6}},
            {"queue_arguments": {"x-max-length": 5}},
            "x-max-length",
        ),
        ({"durable": True}, {"queue_type": "quorum"}, "x-queue-type"),
    ],
)
async def test_a_queue_with_other_arguments(channel, amqp_url, name, there, settings, word) -> None:
    """It names the queue and the difference in the broker's words, and says what to do."""
    queue = await channel.declare_queue(name, **there)
    text = await refusal(TopologyError, url=amqp_url, queue_name=name, **settings)
    assert f"queue '{name}'" in text
    assert word in text
    assert "settings" in text
    await queue.delete()


async def test_a_queue_that_belongs_to_another_connection(channel, amqp_url, name) -> None:
    """Exclusively."""
    await channel.declare_queue(name, exclusive=True)
    text = await refusal(TopologyError, url=amqp_url, queue_name=name)
    assert f"queue '{name}'" in text
    assert "exclusive" in text


async def test_an_exchange_of_another_type(channel, amqp_url, name) -> None:
    """It names the exchange and the type."""
    await channel.declare_exchange(f"{name}.x", "topic", durable=True)
    text = await refusal(
        TopologyError, url=amqp_url, queue_name=name, exchange_name=f"{name}.x", routing_key="k"
    )
    assert f"exchange '{name}.x'" in text
    assert "type" in text


async def test_an_exchange_type_that_the_broker_does_not_know(amqp_url, name) -> None:
    """It says that a plugin may be missing."""
    text = await refusal(
        TopologyError,
        url=amqp_url,
        queue_name=name,
        exchange_name=f"{name}.x",
        exchange_type="x-unheard-of",
    )
    assert f"exchange '{name}.x'" in text
    assert "plugin" in text


async def test_declare_false_creates_nothing(channel, amqp_url, name) -> None:
    """A missing queue and a missing exchange are errors, and stay missing."""
    text = await refusal(TopologyError, url=amqp_url, queue_name=name, declare=False)
    assert f"queue '{name}'" in text
    assert "declare" in text
    await channel.declare_queue(name, durable=True)
    text = await refusal(
        TopologyError, url=amqp_url, queue_name=name, exchange_name=f"{name}.x", declare=False
    )
    assert f"exchange '{name}.x'" in text

    # If everything exists, its arguments don't matter.
    consumer = Acking(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, declare=False, queue_arguments={"x-max-length": 7}
        )
    )
    async with consumer:
        assert consumer.is_healthy


@pytest.mark.parametrize("by", ["dead_letter_exchange", "queue_arguments"])
async def test_a_missing_dead_letter_exchange(amqp_url, name, by) -> None:
    """It is found at start, not with the first dead letter."""
    settings = {"dead_letter_exchange": f"{name}.dlx"}
    if by == "queue_arguments":
        settings = {"queue_arguments": {"x-dead-letter-exchange": f"{name}.dlx"}}
    text = await refusal(TopologyError, url=amqp_url, queue_name=name, **settings)
    assert f"exchange '{name}.dlx'" in text
    assert "create it" in text


async def test_a_stream(amqp_url, name) -> None:
    """Its messages can be neither requeued nor rejected."""
    text = await refusal(
        TopologyError, url=amqp_url, queue_name=name, queue_arguments={"x-queue-type": "stream"}
    )
    assert name in text
    assert "stream" in text


@pytest.mark.needs_node
async def test_a_user_without_permission(rabbitmq, amqp_url, name) -> None:
    """It names the queue, and the missing permission."""
    await asyncio.to_thread(add_user, rabbitmq, name, "secret", "^$", ".*", ".*")
    url = str(URL(amqp_url).with_user(name).with_password("secret"))
    text = await refusal(TopologyError, url=url, queue_name=name)
    assert f"queue '{name}'" in text
    assert "permission" in text


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"url": "http://localhost/"}, "url"),
        ({"url": "amqp://guest:secret@localhost:port/"}, "url"),
        ({"batch_size": 0}, "batch_size"),
        ({"prefetch_count": 70_000}, "prefetch_count"),
        ({"queue_name": ""}, "queue_name"),
        ({"exchange_type": "directly"}, "exchange_type"),
        ({"unhandled_exception_action": "ACK"}, "unhandled_exception_action"),
        ({"queue_type": "stream"}, "queue_type"),
        ({"num_wrkers": 3}, "num_workers"),
    ],
)
async def test_invalid_settings_are_refused_at_construction(name, settings, field) -> None:
    """The error names the field, and comes before any connection."""
    with pytest.raises(ConfigurationError, match=field) as caught:
        Acking(BatchConsumerSettings(**{"queue_name": name, **settings}))
    assert "secret" not in str(caught.value)


# --- a refusal later on ---------------------------------------------------------------


async def test_a_later_refusal_is_waited_out(channel, amqp_url, name, caplog) -> None:
    """The queue has other arguments for a while: unhealthy, and logged once."""
    consumer = Acking(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, reconnect_delay=0.05, reconnect_delay_max=0.2
        )
    )
    async with consumer:
        caplog.clear()
        await channel.queue_delete(name)
        await until(lambda: _declared(channel, name))
        await until(lambda: "x-max-length" in (consumer.status().workers[0].last_error or ""))
        attempts = consumer.status().workers[0].epoch
        await asyncio.sleep(1.0)  # some further attempts
        assert consumer.is_running
        assert not consumer.is_healthy
        complaints = [each for each in caplog.records if "x-max-length" in each.getMessage()]
        assert 1 == len([each for each in complaints if each.levelname != "DEBUG"])
        async with await aio_pika.connect(amqp_url) as connection:
            await (await connection.channel()).queue_delete(name)
        await until(lambda: consumer.is_healthy)
        assert attempts < consumer.status().workers[0].epoch


async def _declared(channel, name) -> bool:
    """Return whether we were faster than the consumer, which declares the queue again at once."""
    async with await aio_pika.connect(str(channel._connection.url)) as connection:
        other = await connection.channel()
        try:
            await other.declare_queue(name, durable=True, arguments={"x-max-length": 9})
        except aio_pika.exceptions.ChannelPreconditionFailed:
            await (await connection.channel()).queue_delete(name)
            return False
        return True


# --- messages that cannot be decoded ---------------------------------------------------


UNDECODABLE = {
    "correlation_id": pack_properties(
        {"correlation_id": short(b"\xff\xfe\x00"), "priority": b"\1"}
    ),
    "message_id": pack_properties({"message_id": short(b"\x80")}),
    "expiration": pack_properties({"type": short(b"\xc3\x28"), "app_id": short(b"a")}),
}


class Reading(BatchConsumer):
    """Reads everything that its messages have, and lets errors pass."""

    def __init__(self, settings, **more) -> None:
        super().__init__(settings, **more)
        self.read: list[object] = []

    async def process_messages(self, messages):
        for message in messages:
            content = message.json()
            read = (content, message.correlation_id, message.message_id, message.type)
            for value in message.headers.values():
                str(value)
            self.read.append(read)
            yield MessageResult.ACK


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.usefixtures("on_both_wires")
async def test_an_undecodable_message_does_not_affect_others(
    channel, amqp_url, name, queue_type
) -> None:
    """Strange properties and an invalid body among good messages, which are handled once."""
    dlx, dlq = await declare_dead_letters(channel, name)
    recorder = Recorder()
    consumer = Reading(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=queue_type,
            batch_size=30,
            batch_timeout=0.3,
            dead_letter_exchange=dlx,
        ),
        observers=[recorder],
    )
    good = [json.dumps(each).encode() for each in range(20)]
    broken = pack_properties(PROPERTIES)
    # A header whose text isn't UTF-8 becomes bytes.
    latin = pack_properties({"headers": pack_table({b"name": b"S" + long(b"gr\xfcn")})})
    async with consumer, RawClient.connect(amqp_url) as raw:
        await publish(channel, good[:10], routing_key=name)
        for properties in UNDECODABLE.values():
            await raw.publish(name, properties, b'"strange"')
        await raw.publish(name, latin, b'"latin"')
        await raw.publish(name, broken, b"{no json")
        await publish(channel, good[10:], routing_key=name)
        await until(
            lambda: recorder.results["ACK"] + len(recorder.dead) == 25,
            what=lambda: (recorder.results, recorder.dead),
        )
        letters = {}
        for _ in range(4):
            letter = await raw.get(dlq)
            letters[letter.properties[:2], letter.body] = letter
    assert sorted([*map(json.loads, good), "latin"], key=str) == sorted(
        (each[0] for each in consumer.read), key=str
    )
    assert {"undecodable"} == {reason for _, reason in recorder.dead}
    assert 4 == len(letters)
    await holds(amqp_url, name, 0)


@pytest.mark.usefixtures("on_both_wires")
async def test_a_header_of_bytes_reaches_handler_and_copy_unchanged(
    channel, amqp_url, name
) -> None:
    """It is not UTF-8: it is read as bytes, and requeued unchanged."""
    seen = []

    class Headers(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                seen.append((message.retry_count, message.headers["name"]))
                yield MessageResult.ACK if message.retry_count else MessageResult.REQUEUE

    settings = BatchConsumerSettings(url=amqp_url, queue_name=name, batch_timeout=0.05)
    properties = pack_properties({"headers": pack_table({b"name": b"S" + long(b"gr\xfcn")})})
    async with Headers(settings), RawClient.connect(amqp_url) as raw:
        await raw.publish(name, properties, b"x")
        await until(lambda: len(seen) == 2)
    assert [0, 1] == [count for count, _ in seen]
    assert seen[0][1] == seen[1][1] == b"gr\xfcn"
    assert [] == await take_all(channel, name)


@pytest.mark.usefixtures("on_both_wires")
async def test_a_message_with_undecodable_headers_is_not_retried(channel, amqp_url, name) -> None:
    """Its attempts can't be counted: it is dead-lettered instead of being retried forever."""
    dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Reading(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, batch_timeout=0.05, dead_letter_exchange=dlx
        )
    )
    # The name of a header isn't UTF-8.
    properties = pack_properties({"headers": pack_table({b"gr\xfcn": b"t\1"})})
    async with consumer, RawClient.connect(amqp_url) as raw:
        await raw.publish(name, properties, b"1")
        letter = await raw.get(dlq)
    assert b"1" == letter.body
    assert [] == consumer.read
