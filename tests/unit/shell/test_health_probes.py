"""The answers of the server for health probes."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch import HealthServer
from aio_pika_batch.health.http_server import respond
from aio_pika_batch.health.server import as_json, liveness, metrics, readiness
from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus
from tests.unit.shell.helpers import RecordingConsumer, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, never


def status(
    *states: WorkerState, is_stuck: bool = False, error: str | None = None
) -> ConsumerStatus:
    """Return the status of a consumer with one worker in each of these states."""
    workers = tuple(
        WorkerStatus(index, state, 1, 0, 0, 0, 999.0 if is_stuck else None, None, 1.0, error)
        for index, state in enumerate(states)
    )
    return ConsumerStatus("Importer", "orders", bool(states), not is_stuck, workers, is_stuck)


@pytest.mark.parametrize("state", WorkerState)
def test_a_worker_is_alive_unless_a_message_is_stuck(state):
    """An unreachable broker is not a reason for a restart."""
    assert [] == liveness([status(state)])
    [reason] = liveness([status(state, is_stuck=True)])
    assert "Importer (orders): a message has been held for 999 s, longer than stuck_after" == reason


@pytest.mark.parametrize("state", WorkerState)
def test_a_worker_is_ready_while_it_takes_messages(state):
    """It is connected, consuming, not draining, and not paused by its breaker."""
    is_ready = state in {WorkerState.CONSUMING, WorkerState.PROBING}
    expected = [] if is_ready else [f"Importer (orders): worker 1 is {state.value}"]
    assert expected == readiness([status(WorkerState.CONSUMING, state)])


def test_a_worker_that_cannot_connect_says_why():
    """Without a password. In other states its last error isn't the reason."""
    error = "amqp://me:s3cret@host: no"
    [reason] = readiness([status(WorkerState.WAITING, error=error)])
    assert "Importer (orders): worker 0 is waiting: amqp://me:***@host: no" == reason
    [reason] = readiness([status(WorkerState.DRAINING, error=error)])
    assert "Importer (orders): worker 0 is draining" == reason


def test_a_consumer_that_was_not_started_is_alive_and_not_ready():
    """Even if it is one of several."""
    assert [] == liveness([status()])
    assert readiness([status(), status(WorkerState.CONSUMING)])


def test_status_shows_no_password():
    """Even if the text of an error contains one."""
    told = json.dumps(as_json([status(WorkerState.WAITING, error="amqp://me:s3cret@host: no")]))
    assert "s3cret" not in told
    assert "amqp://me:***@host: no" in told


async def test_the_endpoints_follow_a_consumer(rabbit):
    """From before its start until a message is stuck."""
    consumer = RecordingConsumer(
        taking(100), transport=rabbit.transport, batch_size=1, stuck_after=50
    )
    server = HealthServer(consumer, port=0)

    def get(path: str) -> bytes:
        return respond(b"GET %s HTTP/1.1\r\n\r\n" % path.encode(), server.answer)

    assert b"200" in get("/livez")[:15]
    assert b"503" in get("/readyz")[:15]
    async with consumer:
        rabbit.put(*numbered(1))
        await asyncio.sleep(1)
        assert get("/livez").endswith(b"\r\n\r\nok\n")
        assert get("/readyz").endswith(b"\r\n\r\nok\n")
        told = json.loads(get("/status").partition(b"\r\n\r\n")[2])
        assert 1 == told["consumers"][0]["workers"][0]["in_hand"]
        await asyncio.sleep(50)
        assert b"503" in get("/livez")[:15]
        assert b"held for 5" in get("/livez")
        await asyncio.sleep(50)
        assert b"200" in get("/livez")[:15]


async def test_an_unreachable_broker_causes_no_restart():
    """The consumer is not ready but alive, however long it takes."""
    script = ScriptedTransport()
    script.on_declare = never
    consumer = RecordingConsumer(transport=script, stuck_after=10)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(3600)
    assert [] == liveness([consumer.status()])
    assert readiness([consumer.status()])
    await consumer.stop()
    await asyncio.wait([starting])
    assert starting.exception()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"HEAD /livez HTTP/1.0\r\n\r\n", 200),
        (b"GET /livez?verbose=1 HTTP/1.1\r\n\r\n", 200),
        (b"GET /livez/ HTTP/1.1\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /livez HTTP/1.1\r\n\r\n", 405),
        (b"GET  /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET http://x/livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/2\r\n\r\n", 400),
        (b"GET /livez\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
    ],
)
def test_only_get_and_head_are_answered(head, status):
    """HEAD like GET, without the body."""
    answer = respond(head, HealthServer(port=0).answer)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    _, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HEAD") == (body == b"")
    assert (b"Allow: GET, HEAD" in answer) == (status == 405)


@given(st.binary(max_size=200))
def test_any_request_gets_one_complete_answer(head):
    """Its Content-Length is right."""
    answer = respond(head, HealthServer(port=0).answer)
    top, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in top


def test_metrics_are_those_of_prometheus_client():
    """In its text format."""
    answer = metrics()
    assert 200 == answer.status
    assert answer.content_type.startswith("text/plain; version=")
    assert "# TYPE python_info gauge" in answer.body


def test_metrics_without_prometheus_client_say_what_to_install(monkeypatch):
    """The answer is 404."""
    monkeypatch.setattr("aio_pika_batch.health.server.has_prometheus", lambda: False)
    answer = metrics()
    assert 404 == answer.status
    assert "pip install 'aio-pika-batch[prometheus]'" in answer.body
