"""What becomes of a publication, and what arrives of it?"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime

from aio_pika_batch.core.message import DecodedSource, Message, Properties
from aio_pika_batch.core.publication import Copy, Outcome, Publication
from aio_pika_batch.errors import SessionClosed
from aio_pika_batch.testing.contract.broken import refused, same
from aio_pika_batch.testing.contract.clause import Chapter
from aio_pika_batch.testing.contract.stage import Stage

CHAPTER = Chapter()


def _all_properties() -> Properties:
    """All that a publisher may set. Made anew each time, since a transport might change it."""
    return Properties(
        content_type="application/json",
        content_encoding="identity",
        headers={"text": "ä", "number": 5, "yes": True, "nothing": None, "drop": 1, "raise": 1},
        delivery_mode=2,
        priority=3,
        correlation_id="correlation",
        reply_to="answers",
        expiration="600000",
        message_id="id",
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        type="order",
        app_id="shop",
    )


_FOREIGNER = "somebody-else"


_ELSEWHERE = DecodedSource("elsewhere", "elsewhere", "x-retry-count", time.time)
"""Where a message came from that was not delivered here, and came decoded."""


def _original(properties: Properties, body: bytes = b"original") -> Message:
    return Message(_ELSEWHERE, 1, False, body, ("", "elsewhere"), properties)


def _everything(message: Message) -> Properties:
    """Its properties, without what brokers count in headers of their own on delivery."""
    properties = message.properties
    if properties.headers is None:
        return properties
    headers = {
        name: value
        for name, value in properties.headers.items()
        if name not in {"x-delivery-count", "x-acquired-count"}
    }
    return replace(properties, headers=headers or None)


async def _arrivals(stage: Stage, *publications: Publication | Copy) -> list[Message]:
    """Publish, and see what comes of it: sorted by body, since not every queue keeps an order."""
    expected = [Outcome.CONFIRMED] * len(publications)
    same(expected, await stage.publish(*publications), "the outcomes")
    async with stage.consuming() as consuming:
        messages = await consuming.take(len(publications))
    return sorted(messages, key=lambda message: message.body)


# --- outcomes -----------------------------------------------------------------------


@CHAPTER.clause("what is CONFIRMED is in the queue, each once")
async def _confirmed(stage: Stage) -> None:
    bodies = [b"%d" % number for number in range(100)]
    outcomes = await stage.publish(*(Publication(body, routing_key=stage.queue) for body in bodies))
    same([Outcome.CONFIRMED] * 100, outcomes, "the outcomes")
    await stage.holds(bodies)


@CHAPTER.clause("publications arrive in their order", "keeps_order")
async def _published_in_order(stage: Stage) -> None:
    bodies = [b"%d" % number for number in range(50)]
    await stage.publish(*(Publication(body, routing_key=stage.queue) for body in bodies))
    await stage.waiting(50)
    same(bodies, await stage.harness.take(stage.queue), "what was in the queue")


@CHAPTER.clause("a mandatory publication that no queue takes is RETURNED", "returns_unroutable")
async def _returned(stage: Stage) -> None:
    there, nowhere = stage.queue, stage.harness.fresh
    async with stage.transport.publisher() as publisher:
        # They share a message id: who tells returns apart by that would mistake one for another.
        publications = [
            Publication(b"%d" % at, routing_key=key, mandatory=mandatory, message_id="same")
            for at, (key, mandatory) in enumerate(
                [(there, True), (nowhere, True), (nowhere, False), (there, True), (nowhere, True)]
            )
        ]
        expected = ["CONFIRMED", "RETURNED", "CONFIRMED", "CONFIRMED", "RETURNED"]
        outcomes = await publisher.publish(publications)
        same(expected, [outcome.name for outcome in outcomes], "the outcomes")
        same(True, publisher.is_open, "is_open")
    await stage.holds([b"0", b"3"])


@CHAPTER.clause("what a full queue does not take is REFUSED", "refuses_when_full")
async def _refused(stage: Stage) -> None:
    full = stage.harness.full
    confirmed: list[bytes] = []
    refusals = 0
    async with stage.transport.publisher() as publisher:
        # A queue may notice late that it is full, so it is given some again and again.
        for first in range(0, 400, 20):
            bodies = [b"%d" % number for number in range(first, first + 20)]
            outcomes = await publisher.publish(
                [Publication(body, routing_key=full) for body in bodies]
            )
            same(set(), set(outcomes) - {Outcome.CONFIRMED, Outcome.REFUSED}, "other outcomes")
            for body, outcome in zip(bodies, outcomes, strict=True):
                if outcome is Outcome.CONFIRMED:
                    confirmed.append(body)
                else:
                    refusals += 1
            if refusals:
                break
        same(True, refusals > 0, "whether any of 400 was refused")
        same(True, publisher.is_open, "is_open")
        same([Outcome.CONFIRMED], list(await publisher.publish([_to(stage)])), "the next outcome")
    await stage.holds(confirmed, full)


@CHAPTER.clause("what goes to an exchange that is not there is REFUSED", "has_exchanges")
async def _no_exchange(stage: Stage) -> None:
    missing = Publication(b"lost", exchange=f"{stage.harness.fresh}-exchange")
    async with stage.transport.publisher() as publisher:
        outcomes = await publisher.publish([_to(stage, b"1"), missing, _to(stage, b"2")])
    same(Outcome.REFUSED, outcomes[1], "its outcome")
    allowed = {Outcome.CONFIRMED, Outcome.UNKNOWN}
    same(set(), {outcomes[0], outcomes[2]} - allowed, "other outcomes of those beside it")


@CHAPTER.clause("to publish nothing is allowed")
async def _publish_nothing(stage: Stage) -> None:
    same([], await stage.publish(), "the outcomes")


@CHAPTER.clause("calls at the same time get the outcomes of their own", "returns_unroutable")
async def _at_the_same_time(stage: Stage) -> None:
    there = _to(stage)
    nowhere = Publication(b"", routing_key=stage.harness.fresh)
    async with stage.transport.publisher() as publisher:
        first, second, third = await asyncio.gather(
            publisher.publish([there, nowhere]),
            publisher.publish([nowhere, there, there]),
            publisher.publish([]),
        )
    same([Outcome.CONFIRMED, Outcome.RETURNED], list(first), "the first call's")
    same(
        [Outcome.RETURNED, Outcome.CONFIRMED, Outcome.CONFIRMED], list(second), "the second call's"
    )
    same([], list(third), "the third call's")


@CHAPTER.clause("a publish that is cancelled confuses nobody")
async def _cancelled(stage: Stage) -> None:
    async with stage.transport.publisher() as publisher:
        cancelled = asyncio.ensure_future(publisher.publish([_to(stage)] * 20))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        outcomes = await publisher.publish([_to(stage, b"later")] * 3)
        same([Outcome.CONFIRMED] * 3, list(outcomes), "the next outcomes")
        same(True, publisher.is_open, "is_open")


@CHAPTER.clause("a publisher that was left raises SessionClosed")
async def _publisher_closed(stage: Stage) -> None:
    async with stage.transport.publisher() as publisher:
        same(True, publisher.is_open, "is_open inside")
    same(False, publisher.is_open, "is_open outside")
    with refused(SessionClosed, "publishing after the end"):
        await publisher.publish([_to(stage)])
    await stage.holds([])


# --- what arrives --------------------------------------------------------------------


@CHAPTER.clause(
    "properties arrive as they were, and what is absent stays absent", "carries_properties"
)
async def _properties(stage: Stage) -> None:
    all_of_them = Publication(
        b"1",
        routing_key=stage.queue,
        expiration=600,
        **{
            name: getattr(_all_properties(), name)
            for name in Properties.__slots__
            if name not in {"expiration", "cluster_id", "undecodable"}
        },
    )
    full, bare = await _arrivals(stage, all_of_them, _to(stage, b"2"))
    same(_all_properties(), _everything(full), "all of them")
    same(Properties(delivery_mode=2), _everything(bare), "none but the default")
    same(stage.queue, full.routing_key, "the routing key")


@CHAPTER.clause("a copy has its original's body and properties, without `drop` and with `add`")
async def _copied(stage: Stage) -> None:
    await stage.publish(
        Publication(b"1", routing_key=stage.queue, headers={"keep": "a", "drop": "b", "more": "c"})
    )
    async with stage.consuming() as consuming:
        [message] = await consuming.take(1)
        copy = Copy(message, "", stage.queue, {"more": "d", "new": "e"}, frozenset({"drop"}))
        same([Outcome.CONFIRMED], await stage.publish(copy), "the outcome")
        [copied] = await consuming.take(1)
        same(message.body, copied.body, "the body")
        same({"keep": "a", "more": "d", "new": "e"}, _everything(copied).headers, "the headers")


@CHAPTER.clause("a copy of a copy counts retries", "carries_properties")
async def _counts(stage: Stage) -> None:
    await stage.harness.put([b"1"])
    async with stage.consuming() as consuming:
        for count in range(3):
            [message] = await consuming.take(1)
            same(count, message.retry_count, "retry_count")
            copy = Copy(message, "", stage.queue, {"x-retry-count": count + 1})
            same([Outcome.CONFIRMED], await stage.publish(copy), "the outcome")


@CHAPTER.clause(
    "a copy keeps all properties, also of a message from elsewhere", "carries_properties"
)
async def _copied_properties(stage: Stage) -> None:
    elsewhere = Copy(_original(_all_properties()), "", stage.queue, {})
    bare = Copy(_original(Properties(), b"plain"), "", stage.queue, {})
    full, plain = await _arrivals(stage, elsewhere, bare)
    same(_all_properties(), _everything(full), "of the first copy")
    same(Properties(), _everything(plain), "of the copy of a message without any")
    await stage.harness.take(stage.queue)
    [again] = await _arrivals(stage, Copy(full, "", stage.queue, {"add": "x"}, frozenset({"drop"})))
    headers = {**(_all_properties().headers or {}), "add": "x"}
    del headers["drop"]
    same(replace(_all_properties(), headers=headers), _everything(again), "of the copy's copy")


@CHAPTER.clause("a copy keeps its expiration, leaves it out, or has another", "carries_properties")
async def _expiration(stage: Stage) -> None:
    def copy(body: bytes, *, keep: bool, expiration: str | None = None) -> Copy:
        return Copy(
            _original(_all_properties(), body),
            "",
            stage.queue,
            {},
            keep_expiration=keep,
            expiration=expiration,
        )

    kept, without, other = await _arrivals(
        stage,
        copy(b"1", keep=True),
        copy(b"2", keep=False),
        copy(b"3", keep=False, expiration="700000"),
    )
    found = [each.properties.expiration for each in (kept, without, other)]
    same(["600000", None, "700000"], found, "the expirations")


@CHAPTER.clause("a copy that no queue takes is RETURNED", "returns_unroutable")
async def _copy_returned(stage: Stage) -> None:
    copy = Copy(_original(_all_properties()), "", stage.harness.fresh, {})
    same([Outcome.RETURNED], await stage.publish(copy), "the outcome")


@CHAPTER.clause("a copy does not carry another user's name", "checks_users", "carries_properties")
async def _foreigner(stage: Stage) -> None:
    original = _original(Properties(user_id=_FOREIGNER, message_id="id"))
    [copied] = await _arrivals(stage, Copy(original, "", stage.queue, {}))
    same((None, "id"), (copied.user_id, copied.message_id), "user_id and message_id")


def _to(stage: Stage, body: bytes = b"") -> Publication:
    return Publication(body, routing_key=stage.queue)
