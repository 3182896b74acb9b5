"""Fixtures of all tests; a real RabbitMQ is found or started once, if a test uses it.

Unit tests use none of these fixtures. No other test is silently skipped: if the broker may not be
killed, tests marked ``needs_node`` are deselected, and the report says so at its start and end.

Property tests draw new examples in each run, print how to reproduce a failure, and never fail for
being slow, since a busy machine says nothing about the code. `nox -s tests` draws fewer of them.
"""

from __future__ import annotations

import signal
import socket
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aio_pika
import asyncpg
import pytest
from coverage import Coverage
from hypothesis import HealthCheck, Phase, settings

from tests.support.find import BrokerSource, NoBrokerError, RunningBroker, choose
from tests.support.mariadb import NoMariadbError, mariadb
from tests.support.postgres import NoPostgresError, postgres
from tests.support.proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from aio_pika.abc import AbstractChannel

    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
    from aio_pika_batch.transport import Wire

settings.register_profile(
    "project", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("project"), max_examples=40)
settings.register_profile(
    "mutants",
    settings.get_profile("project"),
    # That it fails is all that is asked; not how simple the failure can be made.
    phases=[Phase.explicit, Phase.generate],
    database=None,
)
settings.load_profile("project")

_UNIT = Path(__file__).parent / "unit"
_SOURCE = pytest.StashKey[BrokerSource | NoBrokerError]()
_LEFT_OUT = pytest.StashKey[str]()


def pytest_configure() -> None:
    """Let Ctrl-C reach the programs that tests start, even if this run is a background job.

    A shell without job control starts background jobs with SIGINT ignored, and children inherit
    that. A signal that is handled here has its default effect in a child.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_measured(item: pytest.Item) -> bool:
    """Whether a test counts for the coverage: tracing makes it two to four times as slow.

    What property tests cover depends on what they draw: a line that only they reach needs a test of
    its own.
    """
    return not any(item.get_closest_marker(each) for each in ("hypothesis", "untraced"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Measure no coverage while a test runs that doesn't count for it."""
    measured = Coverage.current()
    if measured is None or _is_measured(item):
        return (yield)
    measured.stop()
    try:
        return (yield)
    finally:
        measured.start()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the broker before any test runs, and deselect tests that it must not suffer."""
    if all(item.path.is_relative_to(_UNIT) for item in items):
        return
    try:
        source = config.stash[_SOURCE] = choose()
    except NoBrokerError as error:
        config.stash[_SOURCE] = error
        return
    hurting = [item for item in items if item.get_closest_marker("needs_node")]
    if hurting and not source.has_node:
        config.hook.pytest_deselected(items=hurting)
        items[:] = [item for item in items if item not in hurting]
        config.stash[_LEFT_OUT] = (
            f"NOT RUN: {len(hurting)} tests marked needs_node, which kill or administer the broker;"
            f" {source.description} must not be killed"
        )


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Report which broker is used, and which tests are left out."""
    source = config.stash.get(_SOURCE, None)
    lines = [f"broker: {source.description}"] if isinstance(source, BrokerSource) else []
    if _LEFT_OUT in config.stash:
        lines.append(config.stash[_LEFT_OUT])
    return lines


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Report what is missing again at the end, where it is seen."""
    source = config.stash.get(_SOURCE, None)
    if isinstance(source, NoBrokerError):
        terminalreporter.section("no broker", red=True)
        terminalreporter.write_line(str(source))
    if _LEFT_OUT in config.stash:
        terminalreporter.write_line(config.stash[_LEFT_OUT], yellow=True)


@pytest.fixture(scope="session")
def broker(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningBroker]:
    """A running RabbitMQ: ``broker.url``, ``broker.version``."""
    source = pytestconfig.stash[_SOURCE]
    if isinstance(source, NoBrokerError):
        pytest.fail("there is no broker; the end of the report says what to do", pytrace=False)
    with ExitStack() as running:
        try:
            found = running.enter_context(source.start(tmp_path_factory.mktemp("broker")))
        except NoBrokerError as error:
            no_broker = str(error)
        else:
            no_broker = ""
        if no_broker:  # outside the handler, or the report would tell it twice
            pytest.fail(no_broker, pytrace=False)
        yield found


@pytest.fixture
def amqp_url(broker: RunningBroker) -> str:
    """The broker's URL."""
    return broker.url


@pytest.fixture
def rabbitmq(broker: RunningBroker, request: pytest.FixtureRequest) -> Iterator[RabbitMQ]:
    """The node itself, for tests marked ``needs_node``: they may kill, pause and administer it.

    Afterwards it is started or continued for the next test.
    """
    if request.node.get_closest_marker("needs_node") is None:
        pytest.fail("a test that asks for rabbitmq must be marked needs_node", pytrace=False)
    assert broker.node is not None
    yield broker.node
    broker.node.restore()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A running PostgreSQL, found or started like the broker."""
    with ExitStack() as running:
        try:
            url = running.enter_context(postgres())
        except NoPostgresError as error:
            no_postgres = str(error)
        else:
            no_postgres = ""
        if no_postgres:  # outside the handler, or the report would tell it twice
            pytest.fail(no_postgres, pytrace=False)
        yield url


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """A MariaDB that answers, found or started as the broker is; a URL of SQLAlchemy's."""
    with ExitStack() as running:
        try:
            url = running.enter_context(mariadb())
        except NoMariadbError as error:
            no_mariadb = str(error)
        else:
            no_mariadb = ""
        if no_mariadb:  # outside the handler, or the report would tell it twice
            pytest.fail(no_mariadb, pytrace=False)
        yield url


@pytest.fixture
async def schema(postgres_url: str, name: str) -> AsyncIterator[tuple[asyncpg.Connection, str]]:
    """A new schema, as a connection and a URL that use it."""
    own = name.replace("-", "_")
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE SCHEMA {own}")
    await connection.execute(f"SET search_path TO {own}")
    yield connection, f"{postgres_url}?search_path={own}"
    await connection.execute(f"DROP SCHEMA {own} CASCADE")
    await connection.close()


@pytest.fixture(params=["fast", pytest.param("plain", marks=pytest.mark.long)])
def wire(request: pytest.FixtureRequest) -> Wire:
    """Each way in which the adapter can send and receive messages.

    Whatever both have in common is in the contract, which `nox -s tests` runs on both.
    """
    found: Wire = request.param
    return found


@pytest.fixture
def on_both_wires(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test of a whole consumer twice; ``nox -s wires`` runs all on the plain wire."""
    monkeypatch.setenv("AIO_PIKA_BATCH_WIRE", wire)


@pytest.fixture
def no_such_host(monkeypatch: pytest.MonkeyPatch) -> str:
    """A host that doesn't exist. Machines without a name server would report another error."""
    real = socket.getaddrinfo

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if str(host).endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return "no-such-host.invalid"


@pytest.fixture
def name() -> str:
    """A unique prefix for names of queues and exchanges."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def channel(amqp_url: str) -> AsyncIterator[AbstractChannel]:
    """An aio-pika channel with confirms, to declare and to inspect."""
    async with await aio_pika.connect(amqp_url) as connection:
        yield await connection.channel()


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[TcpProxy]:
    """A proxy to the broker, to cut, freeze and slow down: connect to ``proxy.url(amqp_url)``."""
    where = aio_pika.connection.make_url(amqp_url)
    async with TcpProxy(where.host or "localhost", where.port or 5672) as proxy:
        yield proxy
