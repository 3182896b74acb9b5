"""A password appears nowhere outside the broker connection.

Consumers go through everything that can happen to them, with every logger at DEBUG. Then all their
output, and that of the libraries below, is searched.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import traceback
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

import pytest

from aio_pika_batch import (
    AccessRefused,
    BatchConsumer,
    BatchConsumerSettings,
    ConfigurationError,
    MessageResult,
    Observer,
    PublishError,
)
from aio_pika_batch.adapters.aio_pika.connection import open_connection
from aio_pika_batch.adapters.url import parse_url
from aio_pika_batch.settings.derived import delay_steps
from aio_pika_batch.settings.derived import endpoint as endpoint_of
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from tests.integration.helpers import add_user, delete_user, publish, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aio_pika.abc import AbstractChannel

    from aio_pika_batch import Message
    from tests.support.find import RunningBroker
    from tests.support.proxy import TcpProxy

pytestmark = [pytest.mark.needs_node, pytest.mark.usefixtures("on_both_wires")]

USER = "password"
# Letters at either end, so that one of them is found however the middle is written.
CORES = ("Zq7KxLmW", "wV3TzPnR")
SECRET = f"{CORES[0]}p:@/?#%, é{CORES[1]}"
WRONG = f"{CORES[0]}wrong{CORES[1]}"
KEY_PASSWORD = f"{CORES[0]}key{CORES[1]}"


@pytest.fixture(scope="module")
def password(broker: RunningBroker) -> Iterator[str]:
    """A user of the broker whose password is searched for."""
    assert broker.node is not None
    add_user(broker.node, USER, SECRET, ".*", ".*", ".*")
    yield USER
    delete_user(broker.node, USER)


class Everything:
    """All output, from any source."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def hear(self, *things: object) -> None:
        for each in things:
            self.texts += [repr(each), str(each)]
            if isinstance(each, BaseException):
                self.texts += traceback.format_exception(each)

    def found(self) -> list[str]:
        """Return output that contains the secret, in plain or any encoded form."""
        needles = list(CORES)
        for secret in (SECRET, WRONG):
            needles += [quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:]]
            for plain in (secret, f"\0{USER}\0{secret}", f"{USER}:{secret}"):
                needles.append(base64.b64encode(plain.encode()).decode().rstrip("="))
        return [text for text in self.texts if any(needle in text for needle in needles)]


class EventRecorder(Observer):
    """Records every event."""

    def __init__(self, everything: Everything) -> None:
        for name in vars(Observer):
            if not name.startswith("_"):
                setattr(self, name, everything.hear)


class Failing(BatchConsumer):
    """Fails once for each kind of message, publishes, and acks."""

    async def process_messages(self, messages: Sequence[Message]):
        for message in messages:
            if message.body == b"fail" and not message.retry_count:
                msg = "as the message asks"
                raise RuntimeError(msg)
            if message.body == b"publish":
                await self.publish(b"", routing_key="nowhere-at-all")
            yield MessageResult.ACK


def url_with(password: str, address: str) -> str:
    """Return the URL of a broker with this password."""
    return f"amqp://{USER}:{quote(password, safe='')}@{address}/"


async def test_a_password_appears_nowhere(  # noqa: PLR0915  -- one story, searched once
    password: str,
    proxy: TcpProxy,
    no_such_host: str,
    channel: AbstractChannel,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not in logs, exceptions, events, snapshots or representations, whatever fails."""
    everything = Everything()
    caplog.set_level(logging.DEBUG)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: everything.hear(context, *context.values()))
    await channel.declare_queue(name, durable=True)

    def consumer(url: str, **more: Any) -> Failing:
        options = {"batch_size": 1, "reconnect_delay": 0.05, "reconnect_delay_max": 0.1, **more}
        made = BatchConsumerSettings(url=url, queue_name=name, **options)
        everything.hear(made, made.model_fields_set, delay_steps(made))
        built = Failing(made, observers=[EventRecorder(everything)])
        everything.hear(built, built.status(), endpoint_of(made, "Failing"))
        return built

    async def refused(kind: type[Exception], url: str, **more: Any) -> None:
        with pytest.raises(kind) as caught:
            await consumer(url, **more).start()
        everything.hear(caught.value)

    there = f"{LOCALHOST}:{proxy.port}"
    good = url_with(SECRET, there)

    # --- all that can go wrong while it consumes
    async with consumer(good, num_workers=2) as running:
        await publish(channel, [b"fail", b"publish", b"well"], routing_key=name)
        await until(
            lambda: "nowhere-at-all" in caplog.text and "as the message asks" in caplog.text
        )
        with pytest.raises(PublishError) as caught:
            await running.publish(b"", exchange="no-such-exchange")
        everything.hear(caught.value)
        await proxy.refuse()
        proxy.cut()
        await until(lambda: all(each.last_error for each in running.status().workers))
        everything.hear(running, running.status())
        await proxy.refuse(False)
        await until(lambda: running.is_healthy)

    # --- all that can be wrong from the start
    await refused(AccessRefused, url_with(WRONG, there))
    await refused(AccessRefused, f"{url_with(WRONG, there)},{url_with(SECRET, no_such_host)}")
    await refused(AccessRefused, url_with(SECRET, f"{LOCALHOST}:{proxy.port}") + "no-such-host")
    await refused(AccessRefused, good.replace("amqp://", "amqps://"))
    for wrong in (
        f"amqp://{USER}:{SECRET}@{there}/",
        f"amqp://{USER}:{WRONG}@{there}/?password={WRONG}",
        f"amqp://{USER}:{WRONG}@{there}/?heartbeat=soon",
        f"amqp://{USER}:{WRONG}@host:port/",
        f"amqp://{USER}:{WRONG}",
        f"{good}?cafile=/no/such/file",
        f"ampq://{USER}:{WRONG}@{there}/",
    ):
        with pytest.raises(ConfigurationError) as caught:
            consumer(wrong)
        everything.hear(caught.value)
    for more in (
        {"ssl_key_password": KEY_PASSWORD},
        {"ssl_key_password": KEY_PASSWORD, "ssl_certfile": "/no/such/file"},
        {"ssl_key_password": 7, "ssl_certfile": "/no/such/file"},
    ):
        with pytest.raises(ConfigurationError) as caught:
            consumer(good, **more)
        everything.hear(caught.value)
    dead = (f"{LOCALHOST}:{free_port()}", f"[::1]:{free_port()}")
    waiting = consumer(f"{url_with(SECRET, dead[0])},{url_with(WRONG, dead[1])}")
    starting = asyncio.create_task(waiting.start())
    await until(lambda: any(each.last_error for each in waiting.status().workers))
    everything.hear(waiting.status(), starting)
    await waiting.stop()
    everything.hear(*await asyncio.gather(starting, return_exceptions=True))

    # --- and what is handed around inside
    endpoint = endpoint_of(running.settings, "Failing")
    addresses = parse_url(endpoint.url)
    connection = await open_connection(endpoint)
    everything.hear(endpoint, addresses, connection, connection.connection, connection.tap)
    await connection.close()

    everything.hear(caplog.text, *(vars(record) for record in caplog.records))
    assert {"aiormq.connection", "aio_pika_batch.consumer"} <= {
        record.name for record in caplog.records
    }
    assert [] == everything.found()
