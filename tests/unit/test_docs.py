"""What the documentation states is true.

Every block of Python runs, on the broker in memory and in virtual time; what is between it and a
script of its own is stated in comments that a reader doesn't see:

- ``<!-- test: prelude NAME -->`` before a block: what surrounds it, see `PRELUDES`;
- ``<!-- test: name NAME -->`` and ``<!-- test: continues NAME -->``: a later block of the same page
  goes on where an earlier one has ended;
- ``<!-- test: file NAME -->``: the block is also a file, which later blocks of its page may import,
  and which ``continues NAME`` goes on with;
- ``<!-- test: of PATH -->``: an excerpt, word for word, of a file that other tests run, and which
  therefore does not run here;
- ``<!-- test: on NAME -->``: it needs more than a broker in memory, and runs in
  `tests/integration/test_howto.py` instead;
- ``<!-- test: feed QUEUE BODY BODY … -->``: what is published once its consumers run;
- ``<!-- test: fails -->``: its handler fails on purpose, and the log may say so;
- ``<!-- test: environment NAME=VALUE … -->``: a variable of the environment; several by ``; ``;
- ``<!-- test: prints TEXT -->`` after a block: what it must have printed, on one line or several;
- ``<!-- test: dead QUEUE COUNT -->`` after a block: how many dead letters it must have left.

A program that runs until a signal stops it is sent a SIGTERM after a (virtual) minute, so every
block also shows that it ends.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry

import aio_pika_batch
from aio_pika_batch.adapters import memory
from aio_pika_batch.cli.app import app
from aio_pika_batch.cli.process_manager import ProcessManager, ProcessPolicy
from aio_pika_batch.cli.supervisor import ProcessMetrics
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.core.topology_options import policy_command
from aio_pika_batch.observers.prometheus import PrometheusObserver
from aio_pika_batch.testing import BatchBroker, virtual_time
from aio_pika_batch.testing.rabbitmq.find import RunningBroker
from aio_pika_batch.testing.rabbitmq.fixture import BatchRabbitMQ
from aio_pika_batch.transport import Endpoint, open_transport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

ROOT = Path(__file__).parents[2]
EXAMPLE_PAGES = sorted(ROOT.glob("examples/**/README.md"))
GUIDES = [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/howto/*.md"))]
PAGES = [ROOT / "README.md", *GUIDES, *EXAMPLE_PAGES]
ALL_PAGES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]

URL = "memory://"
PATIENCE = 60.0
"""Virtual seconds after which a program that waits for a signal gets one."""

STORE = """
async def store(order):
    return True
"""

PRELUDES = {
    "importer": f"""{STORE}
import asyncio
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

class Importer(BatchConsumer):
    async def process_messages(self, messages):
        for message in messages:
            stored = await store(message.json())
            yield MessageResult.ACK if stored else MessageResult.REQUEUE
""",
    "order_importer": """
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

settings = BatchConsumerSettings(queue_name="orders", dead_letter_queue="orders.dead")

class OrderImporter(BatchConsumer):
    async def process_messages(self, messages):
        orders = [message.json() for message in messages]
        for _ in messages:
            yield MessageResult.ACK
""",
    "dead": """
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.core.topology import Queue, Topology

async def prepare(transport):
    await transport.declare(Topology(queues=(Queue("orders.dead"),)))
    async with transport.publisher() as publisher:
        headers = {"x-dead-letter-reason": "rejected"}
        letter = Publication(b"no order", routing_key="orders.dead", headers=headers)
        await publisher.publish([letter])
""",
}


@dataclass
class Block:
    """A block of Python on a page, and what its comments say about it."""

    page: Path
    line: int
    source: str
    feed: tuple[str, list[bytes]] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    prints: str | None = None
    dead: tuple[str, int] | None = None
    fails: bool = False
    file: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """What its page has put into files by then."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT_BEFORE = re.compile(r"<!-- test: ([^\n]*?) -->\n\Z")
_EXCERPT = "of "
_ELSEWHERE = "on "
_COMMENT_AFTER = re.compile(r"\A\n<!-- test: ((?:prints|dead) .*?) -->$", re.MULTILINE | re.DOTALL)


def fences(page: Path, *languages: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, text before, body and text after of each fenced block in one of these languages."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        if match[1] in languages:
            line = text.count("\n", 0, match.start(2)) + 1
            yield line, text[: match.start()], match[2], text[match.end() :]


def blocks() -> Iterator[Block]:
    """Every block of Python there is."""
    for page in PAGES:
        named: dict[str, str] = {}
        files: dict[str, str] = {}
        for line, before, body, after in fences(page, "python", "py"):
            block = Block(page, line, body)
            comment = _COMMENT_BEFORE.search(before)
            if comment and comment[1].startswith((_EXCERPT, _ELSEWHERE)):
                continue
            for directive in comment[1].split("; ") if comment else ():
                obey(block, directive, named)
            if block.file is not None:
                files[block.file] = named[block.file] = block.source
            block.files = dict(files)
            comment = _COMMENT_AFTER.search(after)
            if comment:
                verb, _, rest = comment[1].partition(" ")
                if verb == "prints":
                    block.prints = rest
                else:
                    queue, count = rest.split()
                    block.dead = queue, int(count)
            yield block


def obey(block: Block, directive: str, named: dict[str, str]) -> None:
    """Do what a comment before a block says."""
    match directive.split():
        case ["prelude", name]:
            block.source = PRELUDES[name] + block.source
        case ["name", name]:
            named[name] = block.source
        case ["continues", name]:
            block.source = named[name] + block.source
        case ["fails"]:
            block.fails = True
        case ["file", name]:
            block.file = name
        case ["feed", queue, *bodies]:
            block.feed = queue, [each.encode() for each in bodies]
        case ["environment", *variables]:
            block.environment = dict(each.split("=", 1) for each in variables)
        case _:
            pytest.fail(f"{block}: {directive!r} isn't a directive")


FIXTURES: dict[str, Callable[[], object]] = {
    "batch_broker": BatchBroker,
    # Its calls go through the port, so that they reach the broker of these URLs, too.
    "batch_rabbitmq": lambda: BatchRabbitMQ(RunningBroker(URL, "4.3")),
}
"""What a test on a page may ask for, as pytest would give it."""

ORDINARY_HANDLERS = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_IGN)


def run(main: Coroutine[Any, Any, Any], block: Block) -> Any:
    """What `asyncio.run` does in a block: virtual time, work, and a signal at the end."""

    async def program() -> Any:
        running = asyncio.ensure_future(main)
        if block.feed is not None:
            await asyncio.sleep(1)
            queue, bodies = block.feed
            async with open_transport(Endpoint(url=URL)).publisher() as publisher:
                await publisher.publish([Publication(body, routing_key=queue) for body in bodies])
        await asyncio.wait({running}, timeout=PATIENCE)
        if not running.done():
            assert signal.getsignal(signal.SIGTERM) not in ORDINARY_HANDLERS, "it never ends"
            signal.raise_signal(signal.SIGTERM)
        result = await running
        if block.dead is not None:
            transport = open_transport(Endpoint(url=URL))
            assert isinstance(transport, memory.MemoryTransport)
            assert block.dead[1] == len(transport.broker.ready(block.dead[0]))
        return result

    return virtual_time.run(program())


def call_as_pytest_would(test: Any) -> None:
    """With the fixtures that it asks for; once for each value, where it is parametrized."""
    [names, values] = test.pytestmark[0].args if hasattr(test, "pytestmark") else ["", [None]]
    for value in values:
        # What parametrizes a fixture is none of the test's own arguments.
        makers = FIXTURES | {names: lambda value=value: value}
        outcome = test(**{each: makers[each]() for each in inspect.signature(test).parameters})
        if inspect.iscoroutine(outcome):
            virtual_time.run(outcome)


def in_memory(source: str) -> str:
    """The same with every broker's URL replaced."""
    return re.sub(r"amqps?://[^\"'\s]*", URL, source)


def runs() -> Iterator[Any]:
    """Every block; property tests among them measure no coverage, as elsewhere."""
    for block in blocks():
        marks = [pytest.mark.untraced] if "@given" in block.source else []
        yield pytest.param(block, marks=marks, id=str(block))


@pytest.mark.parametrize("block", list(runs()))
def test_python_runs(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a script, and the test functions in it as pytest would run them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", URL)
    monkeypatch.setenv("MY_APP_URL", URL)
    for name, value in block.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(asyncio, "run", lambda main: run(main, block))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, text in block.files.items():
        (tmp_path / name).write_text(in_memory(text))
        # Another page, or another test, may have a module of this name, before or after.
        module = Path(name).stem
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        del sys.modules[module]
    source = in_memory(block.source)
    names: dict[str, Any] = {"__name__": "__main__"}
    code = compile("\n" * (block.line - 1) + source, str(block.page), "exec", dont_inherit=True)

    exec(code, names)  # noqa: S102  -- our own documentation
    for name, value in list(names.items()):
        if name.startswith("test_") and inspect.isfunction(value):
            call_as_pytest_would(value)

    if block.feed and not block.dead and not block.fails:
        assert [] == [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    printed = capsys.readouterr().out
    assert (block.prints or "") in printed


def excerpts() -> Iterator[tuple[str, str, str]]:
    """Place, file and text of each excerpt."""
    for page in PAGES:
        for line, before, body, _ in fences(page, "python", ""):
            comment = _COMMENT_BEFORE.search(before)
            if comment and comment[1].startswith(_EXCERPT):
                yield f"{page.relative_to(ROOT)}:{line}", comment[1].removeprefix(_EXCERPT), body


@pytest.mark.parametrize(("place", "path", "body"), list(excerpts()), ids=lambda value: value[:60])
def test_excerpts_are_what_the_file_has(place: str, path: str, body: str) -> None:
    """Whole lines, in order and unchanged."""
    assert f"\n{body}" in "\n" + (ROOT / path).read_text(), place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_shown_in_another_language(page: Path) -> None:
    """A block in a language that isn't checked could contain mistakes."""
    checked = {"python", "console", "mermaid"}

    assert set(re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)) - {""} <= checked


def commands() -> Iterator[tuple[str, str]]:
    """Every command that is shown, with its place."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for line, _, body, _ in fences(page, "console", "sh", "shell", "bash"):
            for shown in body.splitlines():
                if shown.startswith("$ "):
                    for command in shown[2:].split(" && "):
                        yield f"{page.relative_to(ROOT)}:{line}", command


INSTALLED = {
    "nox",
    ".",
    ".[cli]",
    ".[cli,prometheus]",
    ".[prometheus,otel]",
    "asyncpg",
    "psycopg[binary]",
    "httpx",
    "google-cloud-pubsub",
    "sqlalchemy[asyncio]",
}
"""What pages tell readers to install."""


@pytest.mark.parametrize(("place", "command"), list(commands()), ids=lambda value: value)
def test_commands_exist(place: str, command: str) -> None:
    """A command names a session, a script, or a package that pip installs."""
    noxfile = (ROOT / "noxfile.py").read_text()
    sessions = set(re.findall(r"^def (\w+)\(session", noxfile, re.MULTILINE))
    match shlex.split(command, comments=True):
        case ["python3", "-m", "pip", "install", *packages]:
            assert {each.replace("../aio-pika-batch", ".") for each in packages} <= INSTALLED, place
        case ["aio-pika-batch" | ".venv/bin/aio-pika-batch", *arguments]:
            app.parse_args(arguments, exit_on_error=False, print_error=False)
        case ["docker", "compose", "--file", path, "up", "--build"]:
            assert (ROOT / path).is_file(), place
        case ["curl", address]:
            assert address.startswith("http://127.0.0.1:8080/"), place
        case ["export", *assignments]:
            known = variables(place)
            for assignment in assignments:
                assert assignment.partition("=")[0] in known, place
        case ["python3", "-m", "nox", "-s", session, *_] | [".venv/bin/nox", "-s", session, *_]:
            assert session.partition("(")[0] in sessions, place
        case ["python", script, *_] | ["uvicorn", script]:
            assert written_there(script, place), place
        case (
            ["python3", "-m", "venv", ".venv"]
            | [".venv/bin/pip" | ".venv/bin/python", *_]
            | ["mkdir" | "cd", "shop" | "aio-pika-batch"]
            | ["git", "clone", "https://github.com/aio-pika-batch/aio-pika-batch"]
            | ["docker", "run", "--rm", "-p", "5672:5672", "rabbitmq:4"]
            | ["rabbitmqctl", "set_policy", *_]
        ):
            pass
        case _:
            pytest.fail(f"{place}: no test checks {command!r}")


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_say_what_the_package_index_has(page):
    """Until it has this version, `pip install aio-pika-batch` doesn't install what is described."""
    for paragraph in page.read_text().split("\n\n"):
        # With a path before it, the name is that of the folder.
        if re.search(r"pip\s+install\s+[\"']?aio-pika-batch", paragraph):
            assert "index has" in " ".join(paragraph.split())
            assert "0.1.0" in paragraph


def test_the_policy_of_a_page_is_what_the_log_shows():
    """For a queue that exists without dead-letter arguments."""
    command = policy_command("orders", {"x-dead-letter-exchange": "orders.dlx"}, "/")
    assert f"$ {command}\n" in (ROOT / "docs/guarantees.md").read_text()


def written_there(script: str, place: str) -> bool:
    """Whether a program is part of the project, or a file that the page has its reader write."""
    file = f"{script.removesuffix('.py').partition(':')[0]}.py"
    return (
        (ROOT / script).is_file()
        or f"`{file}`" in page_of(place).read_text()
        or (script == "manage.py" and "django" in place)
    )


def page_of(place: str) -> Path:
    """The page of a place such as `docs/tutorial.md:7`."""
    return ROOT / place.partition(":")[0]


def variables(place: str) -> set[str]:
    """Return the variables that a page's program reads: an example's, or a consumer's settings."""
    main = (ROOT / place).with_name("main.py")
    if main.is_file():
        return set(re.findall(r"`([A-Z_]+)`", main.read_text()))
    fields = aio_pika_batch.BatchConsumerSettings.model_fields
    read_there = re.findall(r'os\.environ\["(\w+)"\]', page_of(place).read_text())
    return {f"AIO_PIKA_BATCH_{name.upper()}" for name in fields} | set(read_there)


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """All anchors of a page."""
    text = _FENCE.sub("", page.read_text())
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link, and the heading that it points to."""
    text = _FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, heading = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        if heading:
            assert heading in anchors(to), target


@pytest.mark.parametrize(
    "words",
    [
        "graceful shutdown",
        "FastAPI",
        "type hints",
        "backoff",
        "exactly once",
        "poison message",
        "idempotent",
        "circuit breaker",
        "backpressure",
        "Django",
        "SQLAlchemy",
        "Kubernetes",
    ],
)
def test_search_finds_what_people_look_for(words: str) -> None:
    """By the words that they use."""
    found = [
        page
        for page in (*GUIDES, *EXAMPLE_PAGES)
        if words.lower() in page.read_text().lower().replace("-", " ")
    ]
    assert found


def generator() -> Any:
    """The script that writes the reference of all settings."""
    path = ROOT / "docs" / "generate_settings.py"
    spec = importlib.util.spec_from_file_location("generate_settings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_reference_is_up_to_date() -> None:
    """If this fails: `python docs/generate_settings.py`."""
    assert generator().page() == (ROOT / "docs" / "settings.md").read_text()


def known_names() -> set[str]:
    """Everything that a page might name: in the package, and what others call their things."""
    names = set(aio_pika_batch.BatchConsumerSettings.model_fields) | THEIRS | {"aio_pika_batch"}
    for info in pkgutil.walk_packages(aio_pika_batch.__path__, "aio_pika_batch."):
        names.update(info.name.split("."))
    for module in (
        aio_pika_batch,
        memory,
        virtual_time,
        importlib.import_module("aio_pika_batch.testing"),
        importlib.import_module("aio_pika_batch.testing.plugin"),
        importlib.import_module("aio_pika_batch.testing.rabbitmq.fixture"),
        importlib.import_module("aio_pika_batch.testing.stories"),
        importlib.import_module("aio_pika_batch.testing.strategies"),
        importlib.import_module("aio_pika_batch.observer"),
        importlib.import_module("aio_pika_batch.observers.otel"),
        importlib.import_module("aio_pika_batch.observers.prometheus"),
        importlib.import_module("aio_pika_batch.testing.contract"),
        importlib.import_module("aio_pika_batch.transport"),
        importlib.import_module("aio_pika_batch.dead_letters"),
        importlib.import_module("aio_pika_batch.inbox"),
        importlib.import_module("aio_pika_batch.outbox"),
    ):
        for name in dir(module):
            value = getattr(module, name)
            names.add(name)
            if inspect.isclass(value):
                names.update(dir(value))
                names.update(getattr(value, "__annotations__", ()))
                names.update(getattr(value, "__slots__", ()))
    registry = CollectorRegistry()
    PrometheusObserver(registry)
    registry.register(ProcessMetrics(ProcessManager(ProcessPolicy(1))))
    for metric in registry.collect():
        names.update(metric.name + suffix for suffix in ("", "_total", "_bucket", "_sum"))
    broker = memory.Broker()
    names.update(dir(broker), dir(broker.faults), dir(broker.journal))
    return names


THEIRS = {
    "exception_type",  # a label
    "foreign_pre_chain",  # structlog's
    "idle_in_transaction_session_timeout",  # PostgreSQL's
    "histogram_quantile",  # Prometheus'
    "max_links",  # an argument of OpenTelemetryObserver
    "message_count",  # OpenTelemetry's, in messaging.batch.message_count
    "messages_discarded",  # a metric of OpenTelemetryObserver
    "messages_held",  # the same
    "max_bytes",  # an argument of Message.json
    "meter_provider",  # an argument of OpenTelemetryObserver
    "prometheus_client",  # a package
    "tracer_provider",  # an argument of OpenTelemetryObserver
    "asyncio_mode",  # pytest-asyncio's
    "at_once",  # an argument of TransportContract.run
    "consumer_timeout",  # RabbitMQ's
    "env_prefix",  # pydantic-settings'
    "declare_exchange",  # aio-pika's
    "fan_in",  # an example's folder
    "no_verify_ssl",  # aio-pika's, in a URL
    "rabbitmq_auth_mechanism_ssl",  # a plugin of RabbitMQ
    "delivery_limit",  # RabbitMQ's, a reason of its dead letters
    "import_definitions",  # rabbitmqctl's
    "on_progress",  # an argument of replay
    "pytest_asyncio_loop_factories",  # pytest-asyncio's
    "requeue_immediate",  # a label's value
    "restarted_in",  # the supervisor's, in a line of the log
    "retry_after",  # what the API of examples/http_sink says
    "rmq_to_pubsub",  # an example
    "set_permissions",  # rabbitmqctl's
    "stream_queue",  # RabbitMQ's
    "test_compose",  # a test
    "to_thread",  # asyncio's
    "consume_orders",  # a command of docs/howto/django.md
    "sync_to_async",  # Django's, like the following
    "close_old_connections",
    "update_conflicts",
    "ignore_conflicts",
    "on_conflict_do_nothing",  # SQLAlchemy's, like the following
    "pool_pre_ping",
    "pool_size",
    "prefix_with",
    "x_queue_type",  # RabbitMQ's, as a keyword
}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in {"architecture.md", "migrating.md"}],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_names_in_prose_exist(page: Path) -> None:
    """A setting, an attribute or a method that a page names in passing is one."""
    text = _FENCE.sub("", page.read_text())
    inline = re.findall(r"`([^`\n]+)`", text)
    named = {name for code in inline for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", code)}

    files = {Path(name).stem for block in blocks() if block.page == page for name in block.files}

    assert named - known_names() - files == set()
