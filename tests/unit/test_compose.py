"""The compose file, the Dockerfile and what they mount fit together, and fit the program."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from aio_pika_batch import BatchConsumerSettings
from aio_pika_batch.cli.app import app

DEPLOY = Path(__file__).parents[2] / "deploy"
ROOT = DEPLOY.parent
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
ENVIRONMENT = COMPOSE["consumer"]["environment"]


def words(instruction: str) -> list[str]:
    """What an instruction of the Dockerfile says, as a list."""
    [said] = re.findall(rf"^ *{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(said)


def test_every_variable_is_a_setting() -> None:
    """One that is not would be ignored without a word."""
    names = {name.removeprefix("AIO_PIKA_BATCH_").lower() for name in ENVIRONMENT}

    assert set() == names - set(BatchConsumerSettings.model_fields)


def test_a_container_has_the_time_to_drain() -> None:
    """And a few seconds for its end."""
    drain = float(ENVIRONMENT["AIO_PIKA_BATCH_SHUTDOWN_TIMEOUT"])

    assert drain + 5 <= float(COMPOSE["consumer"]["stop_grace_period"].removesuffix("s"))


def test_what_a_container_runs_is_ours() -> None:
    """The program and its probe."""
    [program], command = words("ENTRYPOINT"), words(r"CMD(?= \[\"run)")
    probe = words(r"CMD(?= \[\"aio)")

    assert "aio-pika-batch" == program == probe[0]
    for arguments in (command, probe[1:]):
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert "8080" == command[-1]


def test_what_is_mounted_or_copied_is_there() -> None:
    """A path that is not would become an empty folder."""
    for service in COMPOSE.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
    kept = (ROOT / ".dockerignore").read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source
        assert f"!{source}\n" in kept


def test_prometheus_asks_the_consumer_and_knows_the_alerts() -> None:
    """By the names that they have in the compose file."""
    [job] = PROMETHEUS["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")

    assert host in COMPOSE
    assert f"127.0.0.1:{port}:{port}" in COMPOSE[host]["ports"]
    for rules in PROMETHEUS["rule_files"]:
        assert (DEPLOY / "prometheus" / rules).exists()


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    """Where the compose file has put them."""
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "dashboards.yaml").read_text())[
        "providers"
    ]

    assert "http://prometheus:9090" == source["url"]
    mounted = [each.split(":")[1] for each in COMPOSE["grafana"]["volumes"]]
    assert any(each.startswith(provider["options"]["path"]) for each in mounted)


@pytest.mark.parametrize("service", COMPOSE)
def test_nothing_is_open_to_the_world(service: str) -> None:
    """Each port listens on this machine only."""
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE[service].get("ports", ()))
