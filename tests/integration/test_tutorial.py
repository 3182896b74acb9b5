"""Everything that docs/tutorial.md shows works when it is typed.

Its files are written and its commands run in the order of the page: first without a broker, then on
a real RabbitMQ until Ctrl-C. Only the virtual environment is left out, and queues have unique
names.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.helpers import PATIENCE, holds, publish, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aio_pika.abc import AbstractChannel

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
_STEP = re.compile(
    r"^(?:<!-- test: ([^\n]*) -->\n)?```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def steps() -> Iterator[tuple[str, str, str]]:
    """Return the steps of the page: what each is, its file name or None, and its text."""
    files: dict[str, str] = {}
    for directives, language, body in _STEP.findall(PAGE.read_text()):
        if language == "console":
            yield "console", "", body
            continue
        said = dict(each.partition(" ")[::2] for each in directives.split("; "))
        files[said["file"]] = files.get(said.get("continues", ""), "") + body
        yield "file", said["file"], files[said["file"]]


def run(folder: Path, arguments: str) -> str:
    """Run one of the page's commands; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
async def clean(channel: AbstractChannel, name: str) -> AsyncIterator[None]:
    """Delete the queues."""
    yield
    for queue in ("", ".dead", ".retry.1000", ".retry.2000", ".retry.4000"):
        await channel.queue_delete(name + queue)
    await channel.exchange_delete(f"{name}.dlx")


@pytest.mark.usefixtures("clean")
async def test_each_step_shows_what_the_page_says(
    tmp_path: Path,
    amqp_url: str,
    channel: AbstractChannel,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each command prints what the page has below it; Ctrl-C exits with 0."""
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", amqp_url)
    said, ended_with = "", []
    for what, file, text in steps():
        if what == "file":
            (tmp_path / file).write_text(re.sub(r"\borders\b(?=[\".])", name, text))
            continue
        command, *shown = text.splitlines()
        match command.split(maxsplit=2):
            case ["$", ".venv/bin/python", arguments] if "pip" not in arguments:
                said = run(tmp_path, arguments)
                for line in shown:
                    assert line in said
            case ["$", ".venv/bin/aio-pika-batch", arguments]:
                said = run(tmp_path, f"-m aio_pika_batch {arguments}")
                assert "rejected" in said
            case _ if "draining" in text:
                ended_with = text.replace("queue=orders", f"queue={name}").splitlines()
                for line in ended_with:
                    assert line in said
            case _ if ".venv/bin/aio-pika-batch run" in text:
                arguments = text.strip().rpartition("aio-pika-batch ")[2]
                said = await work_until_interrupted(tmp_path, arguments, channel, name, amqp_url)
    assert 2 == len(ended_with)


async def work_until_interrupted(
    folder: Path, arguments: str, channel: AbstractChannel, name: str, url: str
) -> str:
    """Run the consumer, publish to it, press Ctrl-C; return its log."""
    log = folder / "log"
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-u", "-m", "aio_pika_batch", *arguments.split()),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            await until(lambda: "consuming" in log.read_text(), what=log.read_text)
            bodies = [b'{"id": 1, "cents": 495}', b'{"id": 2, "cents": -1}']
            await publish(channel, bodies, routing_key=name)
            await holds(url, f"{name}.dead", 1)
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(PATIENCE):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert 0 == process.returncode, log.read_text()
    return log.read_text()
