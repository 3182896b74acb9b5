"""A minimal HTTP server for health endpoints: GET and HEAD, one request per connection.

It runs on the event loop whose health it reports. If that loop is blocked, the probe times out; a
thread would still answer. It reads the first line of a request only, and its memory, time and
connections are limited. Probes need no body, keep-alive or routing, so no server library is needed.
Neither idle clients nor an error in an answer keep other clients from theirs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.logs import KeywordLogger

MAX_REQUEST = 8 * 1024
"""Bytes of a request line with its headers."""

TIMEOUT = 5.0
"""Seconds to read a request and send its response."""

MAX_CONNECTIONS = 64

MAX_PORT = 65535

PLAIN = "text/plain; charset=utf-8"

_log = KeywordLogger(logging.getLogger("aio_pika_batch.health"))


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response."""

    status: HTTPStatus
    body: str
    content_type: str = PLAIN


Answer = Callable[[str], Response | None]
"""Returns the response for a path; None if there is none."""


def respond(head: bytes, answer: Answer) -> bytes:
    """Return the response to a request as bytes.

    Args:
        head: The request line and the headers.
    """
    with_body = True
    parts = head.split(b"\r\n", 1)[0].split(b" ")
    if len(parts) != 3 or not parts[1].startswith(b"/") or not parts[2].startswith(b"HTTP/1."):  # noqa: PLR2004  -- method, path, version
        found = Response(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request\n")
    elif parts[0] not in (b"GET", b"HEAD"):
        found = Response(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only\n")
    else:
        with_body = parts[0] == b"GET"
        # Latin-1 decodes any byte. A path with such bytes isn't found.
        path = parts[1].split(b"?")[0].decode("latin-1")
        found = _answer_or_500(answer, path) or Response(
            HTTPStatus.NOT_FOUND, "not found; try /livez, /readyz, /status or /metrics\n"
        )
    return render(found, with_body=with_body)


def _answer_or_500(answer: Answer, path: str) -> Response | None:
    try:
        return answer(path)
    except Exception as error:  # noqa: BLE001  -- a broken endpoint must not break the others
        _log.error("a health endpoint failed; answered with 500", exc_info=error, path=path)
        return Response(HTTPStatus.INTERNAL_SERVER_ERROR, "failed; the log has the traceback\n")


def render(response: Response, *, with_body: bool = True) -> bytes:
    """Return a response as bytes."""
    body = response.body.encode()
    status = response.status
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(body)}",
        # A cached answer of a probe would be wrong soon.
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head + body if with_body else head


class HttpServer:
    """Serves health endpoints while its context is open.

    Args:
        port: 0 picks a free port; read it from `port`.

    Attributes:
        answer: Returns the response for a path.

    Raises:
        ConfigurationError: The port is out of range, or, on entering the context, can't be used.
    """

    def __init__(self, answer: Answer, *, host: str, port: int) -> None:
        if not 0 <= port <= MAX_PORT:
            raise ConfigurationError(f"health: the port must be 0 to {MAX_PORT}, not {port}")
        self.answer = answer
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        # By age. True: it has not sent a whole request yet.
        self._clients: dict[asyncio.StreamWriter, bool] = {}
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(
                self._serve, self._host, self._port, limit=MAX_REQUEST
            )
        except OSError as error:
            msg = (
                f"health: cannot listen on {self._host}:{self._port} ({error.strerror or error});"
                " choose another port, or stop the program that uses it"
            )
            raise ConfigurationError(msg) from error
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._server is None:
            return
        self._server.close()
        # A client that reads slowly must not delay the exit of the program.
        for writer in self._clients:
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if len(self._clients) >= MAX_CONNECTIONS:
            self._close_one()
        self._clients[writer] = True
        try:
            async with asyncio.timeout(TIMEOUT):
                writer.write(await self._reply(reader, writer))
                await writer.drain()
                # Closing a connection with unread data resets it, and the response would be lost.
                writer.write_eof()
                while await reader.read(MAX_REQUEST):
                    pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the client is gone, or too slow
        finally:
            self._clients.pop(writer, None)
            writer.transport.abort()

    def _close_one(self) -> None:
        """Make room for a new client, which is more likely a probe than those that do nothing."""
        idle = (writer for writer, is_silent in self._clients.items() if is_silent)
        # All others have their answer, and only don't read it.
        oldest = next(idle, None) or next(iter(self._clients))
        del self._clients[oldest]
        oldest.transport.abort()

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return render(Response(too_large, f"more than {MAX_REQUEST} bytes\n"))
        self._clients[writer] = False
        return respond(head, self.answer)
