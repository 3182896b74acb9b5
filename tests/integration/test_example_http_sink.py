"""A rate-limited API with an outage gets every good event once."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aio_pika_batch import MessageResult, Nack, Requeue
from aio_pika_batch.testing import process
from tests.integration.helpers import PATIENCE, QUEUE_TYPES, holds, take_all

FOLDER = Path(__file__).parents[2] / "examples" / "http_sink"
API = runpy.run_path(str(FOLDER / "api.py"))
MAIN = runpy.run_path(str(FOLDER / "main.py"))


@pytest.fixture
def api(request):
    """An API and its books; the test's parameter says how it differs from one without limits."""
    own = {"rate": 10_000, "outage_after": 10_000, "outage": 0, **getattr(request, "param", {})}
    books = API["Books"](**own)
    server = API["server"](books)
    serving = threading.Thread(target=server.serve_forever, args=(0.05,))
    serving.start()
    yield books, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


def run(url: str, queue: str, api_url: str, **settings: str) -> str:
    """Run the example on its samples; what it prints."""
    own = {"URL": url, "API": api_url, "QUEUE_NAME": queue, "DEAD_LETTER_QUEUE": f"{queue}.dead"}
    # One batch that fails is enough, however many were taken in the same moment: a quick machine
    # has three batches taken before the outage, a slow one none.
    own |= {"BREAKER_PAUSE": "0.2", "BREAKER_THRESHOLD": "0.01", "BREAKER_MIN_SAMPLES": "1"}
    own |= settings
    done = subprocess.run(
        [sys.executable, str(FOLDER / "main.py"), "--samples"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
        env={**os.environ, **{f"HTTP_SINK_{key}": value for key, value in own.items()}},
    )
    assert 0 == done.returncode, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


LIMITED = {"rate": 200, "outage_after": 150, "outage": 0.8}


@pytest.mark.parametrize("api", [LIMITED], indirect=True)
@QUEUE_TYPES
async def test_every_event_is_taken_once_in_spite_of_limits_and_an_outage(
    amqp_url, channel, name, api, queue_type
) -> None:
    """298 are taken, 2 are dead letters with the API's words, and the breaker has opened."""
    books, api_url = api
    said = run(amqp_url, name, api_url, QUEUE_TYPE=queue_type)

    good = {each["id"] for each in MAIN["SAMPLES"] if "email" in each}
    assert good == set(books.events)
    assert 298 == len(good)
    assert books.turned_away
    assert re.search(r"298 events taken, 2 dead letters, [1-9]\d* pauses\n$", said), said

    dead = await take_all(channel, f"{name}.dead", 2)
    assert ["event-17", "event-170"] == sorted(json.loads(each.body)["id"] for each in dead)
    assert ["email is missing"] * 2 == [each.headers["x-dead-letter-detail"] for each in dead]
    await holds(amqp_url, name, 0)


@pytest.mark.parametrize("api", [LIMITED], indirect=True)
def test_it_runs_without_a_broker(api) -> None:
    """As its README says: on a broker in memory."""
    books, api_url = api

    assert "298 events taken, 2 dead letters" in run("memory://", "events", api_url)
    assert 298 == len(books.events)


async def test_each_answer_becomes_a_result(api) -> None:
    """Taken is ACK, refused is NACK with the reason, and what is known already is ACK again."""
    _, api_url = api
    sink = MAIN["Sink"](MAIN["Settings"](url="memory://", api=api_url))
    good, bad = b'{"id": "1", "email": "a@example.org"}', b'{"id": "2"}'

    outcome = await process(sink, [good, bad, good])

    assert [MessageResult.ACK, Nack("email is missing"), MessageResult.ACK] == outcome.results


@pytest.mark.parametrize("api", [{"rate": 0}], indirect=True)
async def test_what_is_put_off_waits_as_long_as_the_api_asks_for(api) -> None:
    """429 with `retry_after`."""
    _, api_url = api
    sink = MAIN["Sink"](MAIN["Settings"](url="memory://", api=api_url))

    outcome = await process(sink, [b'{"id": "1", "email": "a@example.org"}'])

    assert [Requeue("put off by the API", delay=1.0)] == outcome.results


@pytest.mark.parametrize("api", [{"outage_after": 0, "outage": 60}], indirect=True)
async def test_an_api_that_is_away_gets_everything_again(api) -> None:
    """503 with `Retry-After` for the whole request."""
    _, api_url = api
    sink = MAIN["Sink"](MAIN["Settings"](url="memory://", api=api_url))

    outcome = await process(sink, [b'{"id": "1", "email": "a"}', b'{"id": "2", "email": "b"}'])

    assert [Requeue("the API answered 503", delay=1.0)] * 2 == outcome.results
    assert [] == outcome.errors
