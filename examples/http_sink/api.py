"""A typical HTTP API: it has a rate limit and outages, and refuses invalid events.

`POST /events` takes a JSON array and answers item by item. Only the standard library is needed::

    python examples/http_sink/api.py --port 8080

* An event without an `email` is refused: 422.
* It accepts `--rate` events per second. Others get 429, with seconds in `retry_after`.
* After `--outage-after` events there is one outage of `--outage` seconds: 503 with `Retry-After`
  for the whole request.
* An event whose `id` is known gets 200, and isn't counted again.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CREATED, KNOWN, UNPROCESSABLE, TOO_MANY, UNAVAILABLE = 201, 200, 422, 429, 503


@dataclass
class Books:
    """The API's state: what it has stored, and what it accepts now.

    Attributes:
        rate: Events a second.
        outage_after: How many events it takes before it goes away, once.
        outage: For how many seconds.
    """

    rate: float
    outage_after: int
    outage: float
    events: dict[str, Any] = field(default_factory=dict)
    requests: int = 0
    put_off: int = 0
    turned_away: int = 0
    _tokens: float = 0.0
    _filled: float = field(default_factory=time.monotonic)
    _back_at: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, events: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Return an answer for each event; None during the outage."""
        with self._lock:
            self.requests += 1
            now = time.monotonic()
            if self._back_at is None and len(self.events) >= self.outage_after:
                self._back_at = now + self.outage
            if self._back_at is not None and now < self._back_at:
                self.turned_away += 1
                return None
            self._tokens = min(self.rate, self._tokens + (now - self._filled) * self.rate)
            self._filled = now
            return [self._answer(event) for event in events]

    def _answer(self, event: dict[str, Any]) -> dict[str, Any]:
        key = event["id"]
        if key in self.events:
            return {"id": key, "status": KNOWN}
        if "email" not in event:
            return {"id": key, "status": UNPROCESSABLE, "error": "email is missing"}
        if self._tokens < 1:
            self.put_off += 1
            return {"id": key, "status": TOO_MANY, "retry_after": 1.0}
        self._tokens -= 1
        self.events[key] = event
        return {"id": key, "status": CREATED}

    def status(self) -> dict[str, Any]:
        """Return what has happened so far."""
        with self._lock:
            return {
                "events": len(self.events),
                "requests": self.requests,
                "put_off": self.put_off,
                "turned_away": self.turned_away,
            }


def server(books: Books, port: int = 0) -> ThreadingHTTPServer:
    """Make the server; port 0 is any free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            """Take events."""
            events = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers = books.take(events)
            if answers is None:
                self._reply(UNAVAILABLE, {"error": "back in a moment"})
            else:
                self._reply(KNOWN, answers)

        def do_GET(self) -> None:
            """Return the numbers so far."""
            self._reply(KNOWN, books.status())

        def _reply(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == UNAVAILABLE:
                self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Say nothing: the consumer does."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--rate", type=float, default=100, help="events a second")
    parser.add_argument("--outage-after", type=int, default=100, help="events before it goes away")
    parser.add_argument("--outage", type=float, default=3, help="seconds for which it is away")
    options = parser.parse_args()
    api = server(Books(options.rate, options.outage_after, options.outage), options.port)
    print(f"listening on http://127.0.0.1:{api.server_port}", flush=True)
    try:
        api.serve_forever()
    except KeyboardInterrupt:
        api.server_close()
