"""A connection that stays lost once it is lost.

The client's own reconnecting is switched off. Callers that wait for an answer are notified.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError, ServiceUnavailableError

from aio_pika_batch.transport import AccessRefused, BrokerUnavailable, Endpoint, TopologyError

NO_RESPONDERS = "503"
_MISSED_PINGS = 2


class Link:
    """One connection, and the answers that callers wait for.

    Attributes:
        lost: Why the connection ended; None while it is open.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, timeout: float) -> None:
        self.client = Client()
        self.lost: str | None = None
        self.timeout = timeout
        self.watchers: list[Callable[[], None]] = []
        self._answers: dict[str, asyncio.Future[Msg | None]] = {}
        self._inbox = ""
        self._asked = 0

    async def connect(self, endpoint: Endpoint) -> None:
        """Connect, once.

        Raises:
            AccessRefused: The server refuses the login.
            BrokerUnavailable: No server answers.
        """
        refusals: list[Exception] = []

        async def note(error: Exception) -> None:
            refusals.append(error)

        try:
            async with asyncio.timeout(endpoint.connect_timeout):
                await self.client.connect(
                    [url.strip() for url in endpoint.url.split(",")],
                    name=endpoint.connection_name,
                    error_cb=note,
                    closed_cb=self._closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=max(1, round(endpoint.connect_timeout)),
                    ping_interval=endpoint.heartbeat,
                    max_outstanding_pings=_MISSED_PINGS,
                    tls=_tls(endpoint),
                )
            self._inbox = self.client.new_inbox()
            everything = f"{self._inbox}.*"
            await self.client.subscribe(everything, cb=self._answered, pending_bytes_limit=0)
        except (OSError, TimeoutError, errors.Error) as error:
            await self.client.close()
            said = str(refusals[-1] if refusals else error) or type(error).__name__
            if "authorization" in said.lower():
                raise AccessRefused(f"the NATS server does not let us in: {said}") from error
            raise BrokerUnavailable(f"no NATS server answers: {said}") from error

    def lose(self, why: str) -> None:
        """Mark the link as lost."""
        if self.lost is None:
            self.lost = why
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_result(None)
            self._answers.clear()
            for watcher in self.watchers:
                watcher()

    async def send(
        self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send without waiting for an answer."""
        try:
            await self.client.publish(subject, payload, reply=reply, headers=headers)
        except (OSError, errors.ConnectionClosedError) as error:
            self.lose(str(error))

    async def ask(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg | None]:
        """Send, and return a future of the answer; None if the link is lost first."""
        answer: asyncio.Future[Msg | None] = asyncio.get_running_loop().create_future()
        if self.lost is not None:
            answer.set_result(None)
            return answer
        self._asked += 1
        reply = f"{self._inbox}.{self._asked}"
        self._answers[reply] = answer
        answer.add_done_callback(lambda _: self._answers.pop(reply, None))
        await self.send(subject, payload, reply, headers)
        return answer

    async def answers(self, asked: Sequence[asyncio.Future[Msg | None]]) -> list[Msg | None]:
        """Wait for answers; None for each that didn't come in time."""
        try:
            if asked:
                await asyncio.wait(asked, timeout=self.timeout)
            return [each.result() if each.done() else None for each in asked]
        finally:
            for each in asked:
                each.cancel()

    async def close(self) -> None:
        """Close the link."""
        self.lose("it was closed")
        await self.client.close()

    async def _closed(self) -> None:
        self.lose(str(self.client.last_error or "the connection is gone"))

    async def _answered(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)


@asynccontextmanager
async def linked(endpoint: Endpoint) -> AsyncIterator[Link]:
    """Open a link; leaving the context closes it."""
    link = Link(endpoint.publish_timeout)
    await link.connect(endpoint)
    try:
        yield link
    finally:
        await link.close()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Translate errors of JetStream's management into those of the port."""
    try:
        yield
    except (ServiceUnavailableError, errors.NoRespondersError) as error:
        raise BrokerUnavailable(
            f"{what}: JetStream doesn't answer; start nats-server with -js"
        ) from error
    except APIError as error:
        raise TopologyError(f"{what}: {error.description} (error {error.err_code})") from error
    except (OSError, TimeoutError, errors.Error) as error:
        raise BrokerUnavailable(f"{what}: {error}") from error


def _tls(endpoint: Endpoint) -> ssl.SSLContext | None:
    if not (endpoint.ssl_cafile or endpoint.ssl_certfile):
        return None
    context = ssl.create_default_context(cafile=endpoint.ssl_cafile)
    if endpoint.ssl_certfile:
        context.load_cert_chain(endpoint.ssl_certfile, endpoint.ssl_keyfile)
    return context
