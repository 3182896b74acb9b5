"""Starts the Prometheus for tests.

It is the one installed on this machine, or the one that its package manager installs. Without one
the tests fail. The server has its own port of 127.0.0.1 and its own data, which are deleted
afterwards.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn
from tests.support.packages import InstallError, install_and_find, install_commands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_START_TIMEOUT = 60  # seconds; an idle machine needs one

_CONFIGURATION = """
global: {{scrape_interval: 250ms}}
scrape_configs:
  - job_name: tests
    static_configs: [{{targets: ["{target}"]}}]
"""


class NoPrometheusError(Exception):
    """There is no Prometheus; the message says what was tried, and what to do."""


def program(name: str) -> str:
    """Find ``prometheus`` or ``promtool``, or install them."""
    found = shutil.which(name)
    if found:
        return found
    commands = install_commands("prometheus", brew="prometheus")
    if commands is None:
        raise NoPrometheusError(
            f"There is no {name} on PATH, and no package manager that we may use. This will do:\n"
            "  apt-get install --no-install-recommends prometheus"
        )
    try:
        return install_and_find(commands, lambda: shutil.which(name), name)
    except InstallError as error:
        raise NoPrometheusError(str(error)) from error


class Prometheus:
    """A server that scrapes one target."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{LOCALHOST}:{port}"

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression now; raise ``ValueError`` with the server's error if it is
        invalid.
        """
        return list(self._get("query", query=expression)["result"])

    def alerts(self) -> list[str]:
        """The names of its alerts."""
        groups = self._get("rules", type="alert")["groups"]
        return [str(rule["name"]) for group in groups for rule in group["rules"]]

    def is_ready(self) -> bool:
        """Whether it answers, and has scraped its target twice."""
        try:
            scraped = self.ask("count_over_time(up[1m]) >= 2 and up == 1")
        except (OSError, ValueError):  # it listens before it answers
            return False
        return bool(scraped)

    def _get(self, what: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{query}") as answer:  # noqa: S310  -- our own URL
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from error


@contextmanager
def prometheus(
    target: str, folder: Path, configuration: Path | None = None, *, interval: str = "250ms"
) -> Iterator[Prometheus]:
    """Start a server that scrapes *target*, ``host:port``.

    Args:
        target: What is scraped.
        folder: Where its data are kept.
        configuration: A configuration whose target is replaced; None for one without rules.
        interval: How often it scrapes and evaluates with a given configuration.
    """
    if configuration is None:
        configuration = folder / "prometheus.yaml"
        configuration.write_text(_CONFIGURATION.format(target=target))
    else:
        given = yaml.safe_load(configuration.read_text())
        given["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
        given["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        configuration.write_text(yaml.safe_dump(given))
    port = free_port()
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        server = spawn(
            [
                program("prometheus"),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={LOCALHOST}:{port}",
            ],
            cwd=folder,
            stdout=output,
        )
    try:
        found = Prometheus(port)
        deadline = time.monotonic() + _START_TIMEOUT
        while not found.is_ready():
            if server.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-4000:]
                raise NoPrometheusError(f"prometheus did not start, or scraped nothing:\n{said}")
            time.sleep(0.05)
        yield found
    finally:
        kill_group(server)


def promtool(*arguments: str | Path) -> str:
    """Run ``promtool``; raise ``ValueError`` with its output if it fails."""
    command: Sequence[str] = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stdout + done.stderr)
    return done.stdout
