"""A transport of a third party, on NATS JetStream, keeps what the port promises.

It is installed as its users would install it, and found by its URL.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from importlib import invalidate_caches
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import nats
import pytest
from nats.js.errors import NotFoundError

from aio_pika_batch.testing.contract import Features, Harness, TransportContract
from aio_pika_batch.transport import (
    Copy,
    Disposition,
    Endpoint,
    Outcome,
    Queue,
    Settlement,
    Subscription,
    Topology,
    open_transport,
)
from tests.support.nats import NoNatsError
from tests.support.nats import nats as nats_server
from tests.support.proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "transports" / "nats_jetstream"
CONSUMER = "aio-pika-batch"

FEATURES = Features(
    keeps_order=True,
    keeps_place=True,
    prefetches=True,
    marks_redelivered=True,
    counts_deliveries=True,
    returns_unroutable=True,
    refuses_when_full=True,
    carries_properties=True,
    declares=True,
    compares=True,
    has_native=True,
    can_cut=True,
    can_hush=True,
    can_end_subscriptions=True,
    can_lock_out=True,
)


class NatsHarness(Harness):
    """A stream and its consumer, by NATS's own client, and a line that can be cut."""

    def __init__(self, url: str, proxy: TcpProxy, client: nats.NATS) -> None:
        self.transport = open_transport(Endpoint(url=proxy.url(url), heartbeat=1))
        self.queue = f"contract-{uuid.uuid4().hex[:12]}"
        self.fresh = f"{self.queue}-fresh"
        self.full = f"{self.queue}-full"
        self._proxy = proxy
        self._client = client
        self._jetstream = client.jetstream()

    async def put(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            await self._jetstream.publish(f"queue.{self.queue}", body)

    async def count(self, queue: str) -> int | None:
        # The server does not tell what waits from what is handed out, so all of it is fetched and
        # given back.
        found = await self._fetch(queue, b"-NAK")
        return None if found is None else len(found)

    async def take(self, queue: str) -> list[bytes]:
        return await self._fetch(queue, b"+ACK") or []

    async def _fetch(self, queue: str, word: bytes) -> list[bytes] | None:
        try:
            await self._jetstream.add_consumer(queue, durable_name=CONSUMER, max_ack_pending=-1)
        except NotFoundError:
            return None
        inbox = self._client.new_inbox()
        answers = await self._client.subscribe(inbox)
        pull = f"$JS.API.CONSUMER.MSG.NEXT.{queue}.{CONSUMER}"
        await self._client.publish(pull, b'{"batch": 1000, "no_wait": true}', reply=inbox)
        found = []
        while (message := await answers.next_msg(timeout=120)).reply:
            found.append(message)
        await answers.unsubscribe()
        for message in found:
            await self._client.request(message.reply, word, timeout=120)
        return [message.data for message in found]

    async def cut(self) -> None:
        self._proxy.cut()
        self._proxy.thaw()

    async def hush(self) -> None:
        self._proxy.freeze("to_client")

    async def end_subscriptions(self) -> None:
        await self._jetstream.delete_consumer(self.queue, CONSUMER)

    async def lock_out(self) -> None:
        await self._proxy.refuse()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[NatsHarness]:
    """Queues and a line of its own."""
    where = urlsplit(url)
    async with (
        await nats.connect(url) as client,
        TcpProxy(where.hostname or "localhost", where.port or 4222) as proxy,
    ):
        harness = NatsHarness(url, proxy, client)
        full = {"x-max-length": 5, "x-overflow": "reject-publish"}
        queues = (Queue(harness.queue), Queue(harness.full, arguments=full))
        await harness.transport.declare(Topology(queues=queues))
        try:
            yield harness
        finally:
            for queue in (harness.queue, harness.fresh, harness.full):
                with suppress(NotFoundError):
                    await client.jetstream().delete_stream(queue)


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A NATS server that answers, found or started."""
    with ExitStack() as running:
        try:
            url = running.enter_context(nats_server(tmp_path_factory.mktemp("nats")))
        except NoNatsError as error:
            no_nats = str(error)
        else:
            no_nats = ""
        if no_nats:  # outside the handler, or the report would tell it twice
            pytest.fail(no_nats, pytrace=False)
        yield url


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder with the installed package in it, where this process looks, too."""
    folder = str(tmp_path_factory.mktemp("site"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, str(EXAMPLE)], check=True)
    sys.path.append(folder)
    invalidate_caches()
    yield folder
    sys.path.remove(folder)


@pytest.mark.usefixtures("site")
async def test_the_contract_is_kept(nats_url: str) -> None:
    """All that is claimed, by a transport that the URL has found."""
    contract = TransportContract(partial(opened, nats_url), FEATURES, patience=120, quiet=0.3)
    report = await contract.run(at_once=16)
    report.raise_if_broken()
    assert len(report.kept) == len(contract.applicable)


@pytest.mark.usefixtures("site")
async def test_an_existing_stream_is_consumed_unchanged(nats_url: str, name: str) -> None:
    """With its own subjects; and a copy of its message is none of the duplicates it drops."""
    transport = open_transport(Endpoint(url=nats_url))
    tags = {"X-Kind": "theirs", "Nats-Msg-Id": "1"}
    async with await nats.connect(nats_url) as client:
        jetstream = client.jetstream()
        await jetstream.add_stream(name=name, subjects=[f"{name}.>", f"queue.{name}"])
        await jetstream.publish(f"{name}.new", b"body", headers=tags)

        await transport.declare(Topology(queues=(Queue(name, check_only=True),)))
        subscription = Subscription(queue=name, prefetch=1, consumer_tag="tag")
        async with transport.session(subscription) as session, transport.publisher() as publisher:
            [message] = await anext(aiter(session))
            copy = Copy(message, "", name, {"x-retry-count": 1})
            assert [Outcome.CONFIRMED] == list(await publisher.publish([copy]))
            await session.settle([Settlement(Disposition.ACK, (message.delivery_tag,))])
            [copied] = await anext(aiter(session))
        await jetstream.delete_stream(name)

    assert (f"{name}.new", tags) == (message.routing_key, message.headers)
    assert (b"body", 1) == (copied.body, copied.retry_count)
    assert {**tags, "x-retry-count": 1} == copied.headers


def output(site: str, name: str, *arguments: str) -> str:
    """What an example prints; it must say nothing on stderr and end well."""
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name / "main.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


async def test_simple_runs_unchanged(nats_url: str, site: str) -> None:
    """Eight orders, and their sum; and its queue goes with its last consumer."""
    said = output(site, "simple", "--url", nats_url)

    assert list(range(1, 9)) == sorted(int(each) for each in re.findall(r"order (\d+):", said))
    assert said.endswith("8 orders, 43.60 EUR\n")
    async with await nats.connect(nats_url) as client:
        streams = await client.jetstream().streams_info()
    assert [] == [each.config.name for each in streams if "simple" in (each.config.name or "")]


def test_batch_runs_unchanged(nats_url: str, site: str) -> None:
    """Retries and dead letters, each with its reason, are those of RabbitMQ."""
    said = output(site, "batch", "--url", nats_url)

    assert 4 == said.count("dead letter: rejected after 0 retries: no JSON")
    assert 1 == said.count("dead letter: exhausted after 3 retries: out of colours")
    assert said.endswith("40 pictures = 35 thumbnails + 5 dead letters + 0 left; 6 requeues\n")


@pytest.mark.parametrize("way", [(), ("--modern",)], ids=["classic", "modern"])
def test_fan_in_runs_unchanged(nats_url: str, site: str, way: tuple[str, ...]) -> None:
    """Three sources, forty events each, and the writer's batches hold all of them."""
    said = output(site, "fan_in", "--url", nats_url, *way)

    assert ["40", "40", "40"] == re.findall(r": (\d+) written", said)
    assert 120 == sum(int(each) for each in re.findall(r"wrote (\d+)", said))
