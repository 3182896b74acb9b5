"""From a queue into an HTTP API with a rate limit and outages.

A batch is one request, and the API answers for each event. Accepted events are acknowledged,
delayed ones are retried when the API says so, and refused ones become dead letters. During an
outage the circuit breaker keeps the events in the queue. Start `api.py`, and then::

    python examples/http_sink/main.py --samples

`HTTP_SINK_URL` and `HTTP_SINK_API` say where broker and API are; every other setting can be set by
the environment in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Nack,
    Observer,
    Publication,
    Requeue,
    Result,
    WorkerSession,
)
from aio_pika_batch.observer import (
    BreakerClosed,
    BreakerOpened,
    DeadLettered,
    Origin,
    Settled,
)

SAMPLES = [{"id": f"event-{n}", "email": f"reader{n}@example.org"} for n in range(300)]
for _bad in (17, 170):
    del SAMPLES[_bad]["email"]


class Settings(BatchConsumerSettings):
    """The library's settings with defaults of our own, and one more."""

    model_config = SettingsConfigDict(env_prefix="HTTP_SINK_")

    queue_name: str = "events"
    dead_letter_queue: str = "events.dead"
    batch_size: int = 50
    batch_timeout: float = 0.5
    process_timeout: float | None = 30.0
    # The API often puts an event off, which isn't the event's fault: it has many attempts.
    max_requeue_attempts: int = 100
    requeue_delay: float = 1.0
    requeue_delay_max: float = 60.0
    breaker_threshold: float | None = 0.5
    breaker_min_samples: int = 100
    breaker_window: float = 5.0
    breaker_pause: float = 1.0
    api: str = "http://127.0.0.1:8080"


class Sink(BatchConsumer):
    """Posts events.

    An API that cannot be reached is an exception of httpx: the whole batch is requeued.
    """

    settings: Settings
    samples: Sequence[dict[str, str]] = ()

    async def on_start(self) -> None:
        """Open connections that are kept."""
        self.http = httpx.AsyncClient(base_url=self.settings.api, timeout=10)

    async def on_stop(self) -> None:
        """Close them."""
        await self.http.aclose()

    async def on_session(self, session: WorkerSession) -> None:
        """Fill the queue with samples, if asked to."""
        samples, self.samples = self.samples, ()
        await self.publish_many(
            [
                Publication(json.dumps(each).encode(), routing_key=session.queue_name)
                for each in samples
            ]
        )

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Post them together; the API answers in the same order."""
        events = [message.json() for message in messages]
        response = await self.http.post("/events", json=events)
        if response.is_server_error or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            later = Requeue(f"the API answered {response.status_code}", delay=pause(response))
            for _ in messages:
                yield later
            return
        response.raise_for_status()
        for answer in response.json():
            yield result_of(answer)


def pause(response: httpx.Response) -> float | None:
    """Return the seconds that the API asks for; None if it names none, or a date."""
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None


def result_of(answer: dict[str, Any]) -> Result:
    """Return what the answer to one event means for its message."""
    match answer:
        case {"status": 200 | 201}:
            return MessageResult.ACK
        case {"status": 429, "retry_after": delay}:
            return Requeue("put off by the API", delay=delay)
        case {"status": int(status), "error": error} if 400 <= status < 500:  # noqa: PLR2004
            return Nack(error)
        case _:
            return Requeue(f"unexpected answer: {answer.get('status')}")


class Books(Observer):
    """Counts finished messages, and stops the sink when all are done."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.taken = self.dead = self.pauses = 0
        self.sink: Sink | None = None

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count acknowledged events."""
        del origin
        self.taken += sum(
            count for (result, _), count in event.counts.items() if result is MessageResult.ACK
        )
        self._check()

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count a dead letter."""
        del origin
        self.dead += 1
        print(f"{event.reason.value}: {event.message.body.decode()}", flush=True)
        self._check()

    def breaker_opened(self, origin: Origin, event: BreakerOpened) -> None:
        """The API is away."""
        del origin
        self.pauses += 1
        print(
            f"{event.failed} of {event.samples} failed: pausing for {event.pause:g} s", flush=True
        )

    def breaker_closed(self, origin: Origin, event: BreakerClosed) -> None:
        """The API is back."""
        del origin, event
        print("going on", flush=True)

    def _check(self) -> None:
        if self.sink and self.expected and self.taken + self.dead >= self.expected:
            self.sink.request_stop()


async def main(samples: Sequence[dict[str, str]]) -> None:
    """Run until Ctrl-C, or until all samples have come to their end."""
    books = Books(expected=len(samples))
    sink = books.sink = Sink(Settings(), observers=[books])
    sink.samples = samples
    await sink.run()
    print(f"{books.taken} events taken, {books.dead} dead letters, {books.pauses} pauses")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", action="store_true", help="publish 300 events, 2 of them bad, and end"
    )
    asyncio.run(main(SAMPLES if parser.parse_args().samples else ()))
