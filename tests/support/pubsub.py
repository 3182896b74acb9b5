"""What tests of the Google Pub/Sub example publish to, through the real client.

* a small server that implements publishing, and fails on demand;
* Google's emulator, if it and Java are installed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.pubsub_v1 import types

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn

_JARS = Path("/usr/lib/google-cloud-sdk/platform/pubsub-emulator/lib")
_PATIENCE = 30.0


@dataclass
class Service(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is not typed
    """The service `google.pubsub.v1.Publisher`: topics that remember what was published.

    Attributes:
        requests: What each request that was taken has brought, by topic.
        failures: Status codes for the next requests to publish, None for one that is taken; then
            all is well again.
        may_answer: While it is cleared, requests to publish wait.
        waiting: Set once a request to publish has come.
    """

    requests: list[list[Any]] = field(default_factory=list)
    failures: deque[grpc.StatusCode | None] = field(default_factory=deque)
    may_answer: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    _topics: set[str] = field(default_factory=set)

    @property
    def messages(self) -> list[Any]:
        """All messages, in the order of their arrival."""
        return [message for request in self.requests for message in request]

    def service(self, handler_call_details: Any) -> Any:
        """Return the method for a call."""
        match handler_call_details.method.rpartition("/")[2]:
            case "CreateTopic":
                return _unary(self._create_topic, types.Topic, types.Topic)
            case "Publish":
                return _unary(self._publish, types.PublishRequest, types.PublishResponse)
            case _:
                return None

    def _create_topic(self, topic: Any, context: Any) -> Any:
        if topic.name in self._topics:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is one")
        self._topics.add(topic.name)
        return topic

    def _publish(self, request: Any, context: Any) -> Any:
        self.waiting.set()
        self.may_answer.wait()
        if self.failures and (code := self.failures.popleft()) is not None:
            context.abort(code, "as the test wants it")
        if request.topic not in self._topics:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such topic")
        if not all(message.data or message.attributes for message in request.messages):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Some messages are empty")
        self.requests.append(list(request.messages))
        first = len(self.messages) - len(request.messages)
        return types.PublishResponse(
            message_ids=[str(first + place) for place in range(len(request.messages))]
        )


def _unary(behaviour: Callable[[Any, Any], Any], asked: Any, answered: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        behaviour, request_deserializer=asked.deserialize, response_serializer=answered.serialize
    )


@contextmanager
def ours() -> Iterator[tuple[str, Service]]:
    """Run our server; yield the value for `PUBSUB_EMULATOR_HOST`, and the service."""
    service = Service()
    service.may_answer.set()
    # One thread: requests are answered one after another, so their order is a fact.
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port(f"{LOCALHOST}:0")
    server.start()
    try:
        yield f"{LOCALHOST}:{port}", service
    finally:
        service.may_answer.set()
        server.stop(None).wait()


def emulator_jar() -> str | None:
    """Return the path of Google's emulator, if Java is installed, too."""
    jars = sorted(_JARS.glob("cloud-pubsub-emulator-*-all.jar"))
    return str(jars[-1]) if jars and shutil.which("java") else None


@contextmanager
def emulator(jar: str) -> Iterator[str]:
    """Run Google's emulator; yield the value for `PUBSUB_EMULATOR_HOST`."""
    port = free_port()
    command = ["java", "-Xmx256m", "-jar", jar, f"--host={LOCALHOST}", f"--port={port}"]
    process = spawn(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _answers(port):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the emulator does not answer within {_PATIENCE} s")
            time.sleep(0.1)
        yield f"{LOCALHOST}:{port}"
    finally:
        kill_group(process)


def _answers(port: int) -> bool:
    try:
        socket.create_connection((LOCALHOST, port), timeout=1).close()
    except OSError:
        return False
    return True
