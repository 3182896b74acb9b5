"""Kubernetes understands the manifests, and so does the program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from aio_pika_batch import BatchConsumerSettings
from aio_pika_batch.cli.app import app

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"

DOCKERFILE = (FOLDER.parent / "Dockerfile").read_text()


def read(name: str) -> dict[str, dict]:
    """All things of a file, by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / name).read_text())}


CONSUMER, SCALING = read("consumer.yaml"), read("autoscaling.yaml")
POD = CONSUMER["Deployment"]["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
ENVIRONMENT = {each["name"]: each.get("value") for each in CONTAINER["env"]}
PORT = CONTAINER["ports"][0]["containerPort"]


@pytest.mark.parametrize("kind", CONSUMER)
def test_kubernetes_understands_it(kind):
    """By its own schema, which knows all fields."""
    version = kubernetes_validate.latest_version()

    kubernetes_validate.validate(CONSUMER[kind], version, strict=True)


def test_every_variable_is_a_setting():
    """One that is not would be ignored without a word."""
    names = {name.removeprefix("AIO_PIKA_BATCH_").lower() for name in ENVIRONMENT}

    assert set() == names - set(BatchConsumerSettings.model_fields)


def test_a_pod_has_the_time_to_drain():
    """And a few seconds for its end."""
    drain = float(ENVIRONMENT["AIO_PIKA_BATCH_SHUTDOWN_TIMEOUT"])

    assert drain + 5 <= POD["spec"]["terminationGracePeriodSeconds"]


def of_image(instruction: str) -> list[str]:
    """What the last of these instructions in the Dockerfile says."""
    lines = [line for line in DOCKERFILE.splitlines() if line.startswith(f"{instruction} [")]
    return json.loads(lines[-1].removeprefix(instruction))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("run", of_image("ENTRYPOINT") + of_image("CMD")),
        # Kubernetes' command takes the place of the entry point, and its args that of CMD.
        ("run", CONTAINER.get("command", of_image("ENTRYPOINT")) + CONTAINER["args"]),
        ("health", CONTAINER["readinessProbe"]["exec"]["command"]),
    ],
    ids=["image", "pod", "probe"],
)
def test_its_commands_are_ours(command, line):
    """What the image, a pod and its probe run is understood by the command line."""
    program, *arguments = line

    assert "aio-pika-batch" == program
    assert command == arguments[0]
    app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_a_pod_writes_nothing():
    """The consumer runs on a read-only file system, and not as root."""
    context = CONTAINER["securityContext"]

    assert (True, True) == (context["readOnlyRootFilesystem"], context["runAsNonRoot"])
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)


def test_all_speak_of_the_same_port():
    """The program, its probes, and who reads its metrics."""
    asked = urlsplit(CONTAINER["readinessProbe"]["exec"]["command"][-1])

    assert str(PORT) == CONTAINER["args"][-1]
    assert PORT == asked.port
    assert "/readyz" == asked.path
    assert str(PORT) == POD["metadata"]["annotations"]["prometheus.io/port"]
    for probe in ("startupProbe", "livenessProbe"):
        assert {"path": "/livez", "port": "health"} == CONTAINER[probe]["httpGet"]


def test_what_is_scaled_is_there():
    """The Deployment, its queue, and the secret with the url."""
    scaled = SCALING["ScaledObject"]["spec"]
    secret = SCALING["TriggerAuthentication"]["spec"]["secretTargetRef"][0]

    assert CONSUMER["Deployment"]["metadata"]["name"] == scaled["scaleTargetRef"]["name"]
    assert (
        ENVIRONMENT["AIO_PIKA_BATCH_QUEUE_NAME"] == scaled["triggers"][0]["metadata"]["queueName"]
    )
    assert secret["name"] == CONSUMER["Secret"]["metadata"]["name"]
    assert secret["key"] in CONSUMER["Secret"]["stringData"]
