"""Publishes messages. JetStream confirms each in the inbox that it was sent with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from nats.aio.msg import Msg

from aio_pika_batch.transport import Outcome, Outgoing, SessionClosed
from aio_pika_batch_nats.headers import encoded
from aio_pika_batch_nats.link import NO_RESPONDERS, Link
from aio_pika_batch_nats.names import subject_of


class NatsPublisher:
    """A publisher on a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._ended = False

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed."""
        return not self._ended and self._link.lost is None

    def end(self) -> None:
        """Close the publisher."""
        self._ended = True

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish all at once, and wait for the confirmation of each.

        Raises:
            SessionClosed: The publisher was left before.
        """
        if self._ended:
            raise SessionClosed("the publisher is closed; it was left before")
        outcomes = [Outcome.REFUSED] * len(publications)
        sent: list[int] = []
        asked = []
        for at, each in enumerate(publications):
            headers = encoded(each.properties)
            size = len(each.body) + sum(len(a) + len(b) + 4 for a, b in (headers or {}).items())
            # The server would close the connection over it.
            if self._link.lost or size + _HEAD < self._link.client.max_payload:
                subject = subject_of(each.exchange, each.routing_key)
                sent.append(at)
                asked.append(await self._link.ask(subject, bytes(each.body), headers))
        for at, answer in zip(sent, await self._link.answers(asked), strict=True):
            outcomes[at] = _outcome(answer, mandatory=publications[at].mandatory)
        return outcomes


_HEAD = len(b"NATS/1.0\r\n\r\n")


def _outcome(answer: Msg | None, *, mandatory: bool) -> Outcome:
    if answer is None:
        return Outcome.UNKNOWN
    if answer.headers and answer.headers.get("Status") == NO_RESPONDERS:
        # No stream has that subject.
        return Outcome.RETURNED if mandatory else Outcome.CONFIRMED
    return Outcome.REFUSED if "error" in json.loads(answer.data) else Outcome.CONFIRMED
