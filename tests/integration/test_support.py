"""The brokers, servers and proxies of the tests do what the tests rely on.

A fault test that passes because the fault never happened is worse than none.
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import aio_pika
import pytest

from aio_pika_batch.testing.rabbitmq import find as shipped
from aio_pika_batch.testing.rabbitmq.node import broker_version
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from tests.integration.helpers import PATIENCE
from tests.support import find, postgres
from tests.support.fetch import sources
from tests.support.proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
    from tests.support.find import RunningBroker


# --- the node -------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.needs_node
async def test_a_killed_node_keeps_durable_data(
    rabbitmq: RabbitMQ, amqp_url: str, name: str
) -> None:
    """After SIGKILL and a start, a confirmed message in a durable queue is still there."""
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(name, durable=True)
        await channel.default_exchange.publish(
            aio_pika.Message(b"kept", delivery_mode=aio_pika.DeliveryMode.PERSISTENT), name
        )
        rabbitmq.kill()
    assert broker_version(LOCALHOST, rabbitmq.port) is None

    await asyncio.to_thread(rabbitmq.start)

    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(name)
        message = await queue.get(no_ack=True)
        assert b"kept" == message.body
        await queue.delete(if_unused=False, if_empty=False)  # 4.x counts a moment later


@pytest.mark.needs_node
def test_a_paused_node_is_silent_and_then_continues(
    rabbitmq: RabbitMQ, broker: RunningBroker
) -> None:
    """While it is paused, its kernel accepts connections, and nothing answers on them."""
    rabbitmq.pause()
    assert broker_version(LOCALHOST, rabbitmq.port, timeout=0.3) is None

    rabbitmq.resume()
    assert broker.version == broker_version(LOCALHOST, rabbitmq.port)


@pytest.mark.needs_node
async def test_connections_can_be_closed_by_the_broker(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    """The client gets 320, with the given reason."""
    connection = await aio_pika.connect(amqp_url)
    closed: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    connection.close_callbacks.add(lambda _, reason: closed.set_result(reason))

    await asyncio.to_thread(rabbitmq.close_all_connections, "spring cleaning")

    assert "spring cleaning" in str(await asyncio.wait_for(closed, PATIENCE))


@pytest.mark.long
@pytest.mark.needs_node
async def test_a_memory_alarm_blocks_publishing_until_it_ends(
    rabbitmq: RabbitMQ, amqp_url: str, name: str
) -> None:
    """No confirm comes under the alarm; afterwards it does."""
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(name, exclusive=True)
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        publishing = asyncio.ensure_future(
            channel.default_exchange.publish(aio_pika.Message(b"late"), name)
        )
        _, waiting = await asyncio.wait([publishing], timeout=0.5)
        assert {publishing} == waiting

        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
        await asyncio.wait_for(publishing, PATIENCE)


if sys.platform == "linux":  # elsewhere there is no parent-death signal to be tested

    def test_no_child_outlives_a_killed_test_run() -> None:
        """If the process that spawned a child is killed by SIGKILL, the child dies, too."""
        story = (
            "import subprocess, time\n"
            "from aio_pika_batch.testing.rabbitmq.processes import spawn\n"
            "print(spawn(['sleep', '600'], stdout=subprocess.DEVNULL).pid, flush=True)\n"
            "time.sleep(600)\n"
        )
        with subprocess.Popen([sys.executable, "-c", story], stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            child = os.pidfd_open(int(run.stdout.readline()))
            run.kill()
        try:
            assert [child] == select.select([child], [], [], 10)[0]
        finally:
            os.close(child)


def test_test_runs_share_no_ports() -> None:
    """Otherwise one could take another's before its server listens, or while that is stopped."""
    draw = (
        "import random, sys\n"
        "random.seed(1)\n"  # so that both would begin with the same ports
        "from aio_pika_batch.testing.rabbitmq.processes import free_port\n"
        "print(*[free_port() for _ in range(150)], flush=True)\n"
        "sys.stdin.read()\n"
    )
    drawn: list[int] = []
    with ExitStack() as stack:
        for _ in range(2):
            run = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", draw], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            assert run.stdout is not None
            drawn += map(int, run.stdout.readline().split())
    assert 300 == len(set(drawn))


# --- finding a broker -----------------------------------------------------------


def test_a_broker_named_by_url_must_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If it does not, that is an error; no other broker is used."""
    monkeypatch.setenv(find.URL, f"amqp://guest:guest@{LOCALHOST}:{free_port()}/")
    source = find.choose()
    assert not source.has_node
    with pytest.raises(find.NoBrokerError, match="no broker answers"), source.start(tmp_path):
        pass


def test_a_broker_named_by_url_is_used(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It answers, and tests may not kill it."""
    monkeypatch.setenv(find.URL, broker.url)
    with find.choose().start(tmp_path) as found:
        assert (broker.url, broker.version, None) == (found.url, found.version, found.node)


def test_without_a_broker_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what was tried."""
    for variable in (find.URL, find.SERVER):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(shipped, "installed", lambda: None)
    monkeypatch.setattr(shipped, "_docker_answers", lambda: False)
    monkeypatch.setattr(find, "_install_commands", lambda: None)
    with pytest.raises(find.NoBrokerError, match=r"(?s)Tried.*Do one of these"):
        find.choose()


def test_looking_for_docker_leaves_no_socket_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The garbage collector's warning about one would fail another test."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        gc.collect()
        warned.clear()  # of what other tests have left
        assert not shipped._docker_answers()
        gc.collect()
    assert [] == [str(each.message) for each in warned]


def test_postgres_keeps_its_data_where_its_user_can_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Although TMPDIR is below a folder that only its owner may enter."""
    closed = tmp_path / "closed"
    (closed / "tmp").mkdir(parents=True)
    closed.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(closed / "tmp"))
    with postgres._data_folder() as folder:
        subprocess.run([*postgres._as_user(), "touch", str(folder / "data")], check=True)
    assert not folder.exists()


def test_a_postgres_named_by_url_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if another one is installed."""
    monkeypatch.setenv(postgres.URL, "postgresql://somewhere/else")
    with postgres.postgres() as url:
        assert "postgresql://somewhere/else" == url


def test_without_a_postgres_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what was tried."""
    monkeypatch.delenv(postgres.URL, raising=False)
    monkeypatch.setattr(postgres, "installed", lambda: None)
    monkeypatch.setattr(postgres, "install_commands", lambda *_, **__: None)
    with (
        pytest.raises(postgres.NoPostgresError, match=r"(?s)Tried.*Do one of these"),
        postgres.postgres(),
    ):
        pass


def test_an_installation_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that failed."""
    monkeypatch.delenv(postgres.URL, raising=False)
    monkeypatch.setattr(postgres, "installed", lambda: None)
    monkeypatch.setattr(postgres, "install_commands", lambda *_, **__: [["false"]])
    with pytest.raises(postgres.NoPostgresError, match="`false` failed"), postgres.postgres():
        pass


@pytest.mark.parametrize(("ci", "first"), [("", "container"), ("1", "private node")])
def test_only_a_build_machine_prefers_installing_to_docker(
    monkeypatch: pytest.MonkeyPatch, ci: str, first: str
) -> None:
    """There packages may be installed, and all tests must run."""
    for variable in (find.URL, find.SERVER):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shipped, "installed", lambda: None)
    monkeypatch.setattr(shipped, "_docker_answers", lambda: True)
    monkeypatch.setattr(find, "_install_commands", lambda: [["true"]])
    assert first in find.choose().description


def test_both_formats_of_apt_sources_are_read(tmp_path: Path) -> None:
    """The one-line format with and without options, and the stanzas; ``deb-src`` is skipped."""
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# a comment\n"
        "deb http://one.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/key.gpg] http://two.example/debian trixie main contrib\n"
        "deb-src http://src.example/debian trixie main\n"
    )
    (tmp_path / "sources.list.d" / "x.sources").write_text(
        "Types: deb\n# why\nURIs: http://three.example/debian\nSuites: a b\nSigned-By: /k.gpg\n\n"
        "Types: deb-src\nURIs: http://src.example/debian\nSuites: a\n"
    )
    assert [
        ("http://one.example/debian", ("bookworm",)),
        ("http://two.example/debian", ("trixie",)),
        ("http://three.example/debian", ("a", "b")),
    ] == [(source.uri, source.suites) for source in sources(tmp_path)]
    assert ["/key.gpg", "/k.gpg"] == [source.signed_by for source in sources(tmp_path)][1:]


# --- the line -------------------------------------------------------------------


@pytest.fixture
async def echo() -> AsyncIterator[TcpProxy]:
    """A proxy in front of an echo server."""

    async def say_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(1 << 16):
                writer.write(chunk)
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(say_back, LOCALHOST)
    async with TcpProxy(*server.sockets[0].getsockname()) as proxy:
        yield proxy
    server.close()


@asynccontextmanager
async def connected(
    proxy: TcpProxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection through *proxy*, and close it at the end."""
    reader, writer = await asyncio.open_connection(LOCALHOST, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_the_proxy_forwards_both_directions_and_the_end(echo: TcpProxy) -> None:
    """A megabyte comes back unchanged, and an EOF reaches the other side."""
    sent = os.urandom(1 << 20)
    async with connected(echo) as (reader, writer):
        writer.write(sent)
        writer.write_eof()
        assert sent == await reader.read()
    assert 1 == echo.accepted


async def test_a_cut_is_a_reset(echo: TcpProxy) -> None:
    """The client gets ECONNRESET, not EOF; a new connection works."""
    async with connected(echo) as (reader, writer):
        writer.write(b"x")
        assert b"x" == await reader.readexactly(1)
        echo.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
    async with connected(echo) as (reader, writer):
        writer.write(b"y")
        assert b"y" == await reader.readexactly(1)
    assert 2 == echo.accepted


async def test_a_cut_after_n_bytes_lets_exactly_those_through(echo: TcpProxy) -> None:
    """Ten of twenty bytes arrive, and then the reset."""
    echo.cut_after(10)
    async with connected(echo) as (reader, writer):
        writer.write(b"0123456789abcdefghij")
        assert b"0123456789" == await reader.readexactly(10)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


async def test_the_proxy_can_refuse_and_accept_connections(echo: TcpProxy) -> None:
    """ECONNREFUSED at once; open connections stay open; then the same port accepts again."""
    async with connected(echo) as (reader, writer):
        await echo.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(LOCALHOST, echo.port)
        writer.write(b"still here")
        assert b"still here" == await reader.readexactly(10)
    await echo.refuse(False)
    async with connected(echo):
        pass


@pytest.mark.parametrize("direction", ["to_broker", "to_client"])
async def test_a_frozen_direction_carries_nothing_until_it_thaws(
    echo: TcpProxy, direction: str
) -> None:
    """The bytes are read and not forwarded; after the thaw all of them are."""
    async with connected(echo) as (reader, writer):
        echo.freeze(direction)
        writer.write(b"into the dark")
        await writer.drain()
        reading = asyncio.ensure_future(reader.readexactly(13))
        assert (set(), {reading}) == await asyncio.wait([reading], timeout=0.2)
        echo.thaw()
        assert b"into the dark" == await asyncio.wait_for(reading, PATIENCE)


async def test_a_frozen_connection_can_be_cut(echo: TcpProxy) -> None:
    """The held bytes are lost."""
    async with connected(echo) as (reader, writer):
        echo.freeze()
        writer.write(b"lost")
        await asyncio.sleep(0.05)
        echo.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert 0 == echo.connections


async def test_latency_delays_each_direction_without_reducing_throughput(echo: TcpProxy) -> None:
    """A round trip takes twice the latency, and twenty sent together take hardly longer."""
    echo.latency(0.1)
    loop = asyncio.get_running_loop()
    async with connected(echo) as (reader, writer):
        begun = loop.time()
        for number in range(20):
            writer.write(bytes([number]))
            await asyncio.sleep(0.002)
        assert bytes(range(20)) == await reader.readexactly(20)
        assert 0.2 <= loop.time() - begun < 3


async def test_an_amqp_client_works_through_the_proxy(
    proxy: TcpProxy, amqp_url: str, name: str
) -> None:
    """``proxy.url`` can be used like the broker's URL."""
    async with await aio_pika.connect(proxy.url(amqp_url)) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(name, exclusive=True)
        await channel.default_exchange.publish(aio_pika.Message(b"hello"), name)
        assert b"hello" == (await queue.get(no_ack=True)).body
    assert 1 == proxy.accepted
