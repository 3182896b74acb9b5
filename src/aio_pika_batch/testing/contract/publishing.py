"""Clauses about the outcomes of publications, and about what arrives."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime

from aio_pika_batch.core.message import DecodedSource, Message, Properties
from aio_pika_batch.core.publication import OMITTED, Copy, Outcome, Publication
from aio_pika_batch.errors import SessionClosed
from aio_pika_batch.testing.contract.checks import CheckContext, ClauseGroup, expect, expect_error

GROUP = ClauseGroup()


def _all_properties() -> Properties:
    """Return all properties a publisher may set; a new object, since a transport may change it."""
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


_OTHER_USER = "other-user"

_ELSEWHERE = DecodedSource("elsewhere", "elsewhere", "x-retry-count", time.time)
"""The source of a message that another transport delivered, with decoded properties."""


def _original(properties: Properties, body: bytes = b"original") -> Message:
    return Message(_ELSEWHERE, 1, False, body, ("", "elsewhere"), properties)


def _sent_properties(message: Message) -> Properties:
    """Return a message's properties without the headers in which brokers count deliveries."""
    properties = message.properties
    if properties.headers is None:
        return properties
    headers = {
        name: value
        for name, value in properties.headers.items()
        if name not in {"x-delivery-count", "x-acquired-count"}
    }
    return replace(properties, headers=headers or None)


async def _roundtrip(ctx: CheckContext, *publications: Publication | Copy) -> list[Message]:
    """Publish and receive; sorted by body, since not every queue keeps the order."""
    expected = [Outcome.CONFIRMED] * len(publications)
    expect(expected, await ctx.publish(*publications), "the outcomes")
    async with ctx.read() as reader:
        messages = await reader.take(len(publications))
    return sorted(messages, key=lambda message: message.body)


# --- outcomes -----------------------------------------------------------------------


@GROUP.clause("a CONFIRMED publication is in the queue, once")
async def _confirmed(ctx: CheckContext) -> None:
    bodies = [b"%d" % number for number in range(100)]
    outcomes = await ctx.publish(*(ctx.to_queue(body) for body in bodies))
    expect([Outcome.CONFIRMED] * 100, outcomes, "the outcomes")
    await ctx.expect_messages(bodies)


@GROUP.clause("publications arrive in order", "keeps_order")
async def _published_in_order(ctx: CheckContext) -> None:
    bodies = [b"%d" % number for number in range(50)]
    await ctx.publish(*(ctx.to_queue(body) for body in bodies))
    await ctx.expect_count(50)
    expect(bodies, await ctx.harness.take(ctx.queue), "what was in the queue")


@GROUP.clause(
    "a mandatory publication that no queue is bound for is RETURNED", "returns_unroutable"
)
async def _returned(ctx: CheckContext) -> None:
    queue, missing = ctx.queue, ctx.harness.fresh
    async with ctx.transport.publisher() as publisher:
        # They share a message id: a transport that matches returns by it mistakes one for another.
        publications = [
            Publication(b"%d" % at, routing_key=key, mandatory=mandatory, message_id="same")
            for at, (key, mandatory) in enumerate(
                [(queue, True), (missing, True), (missing, False), (queue, True), (missing, True)]
            )
        ]
        expected = ["CONFIRMED", "RETURNED", "CONFIRMED", "CONFIRMED", "RETURNED"]
        outcomes = await publisher.publish(publications)
        expect(expected, [outcome.name for outcome in outcomes], "the outcomes")
        expect(True, publisher.is_open, "is_open")
    await ctx.expect_messages([b"0", b"3"])


@GROUP.clause("a publication that a full queue does not take is REFUSED", "refuses_when_full")
async def _refused(ctx: CheckContext) -> None:
    full = ctx.harness.full
    confirmed: list[bytes] = []
    refusals = 0
    async with ctx.transport.publisher() as publisher:
        # A queue may notice late that it is full, so publish in several rounds.
        for first in range(0, 400, 20):
            bodies = [b"%d" % number for number in range(first, first + 20)]
            outcomes = await publisher.publish(
                [Publication(body, routing_key=full) for body in bodies]
            )
            expect(set(), set(outcomes) - {Outcome.CONFIRMED, Outcome.REFUSED}, "other outcomes")
            for body, outcome in zip(bodies, outcomes, strict=True):
                if outcome is Outcome.CONFIRMED:
                    confirmed.append(body)
                else:
                    refusals += 1
            if refusals:
                break
        expect(True, refusals > 0, "whether any of 400 was refused")
        expect(True, publisher.is_open, "is_open")
        outcomes = await publisher.publish([ctx.to_queue()])
        expect([Outcome.CONFIRMED], list(outcomes), "the next outcome")
    await ctx.expect_messages(confirmed, full)


@GROUP.clause("a publication to a missing exchange is REFUSED", "has_exchanges")
async def _no_exchange(ctx: CheckContext) -> None:
    missing = Publication(b"lost", exchange=f"{ctx.harness.fresh}-exchange")
    async with ctx.transport.publisher() as publisher:
        outcomes = await publisher.publish([ctx.to_queue(b"1"), missing, ctx.to_queue(b"2")])
    expect(Outcome.REFUSED, outcomes[1], "its outcome")
    allowed = {Outcome.CONFIRMED, Outcome.UNKNOWN}
    expect(set(), {outcomes[0], outcomes[2]} - allowed, "unexpected outcomes of its neighbours")


@GROUP.clause("publishing nothing is allowed")
async def _publish_nothing(ctx: CheckContext) -> None:
    expect([], await ctx.publish(), "the outcomes")


@GROUP.clause("concurrent calls of publish get their own outcomes", "returns_unroutable")
async def _concurrent_calls(ctx: CheckContext) -> None:
    routed = ctx.to_queue()
    unroutable = Publication(b"", routing_key=ctx.harness.fresh)
    async with ctx.transport.publisher() as publisher:
        first, second, third = await asyncio.gather(
            publisher.publish([routed, unroutable]),
            publisher.publish([unroutable, routed, routed]),
            publisher.publish([]),
        )
    expect([Outcome.CONFIRMED, Outcome.RETURNED], list(first), "the first call's")
    expect(
        [Outcome.RETURNED, Outcome.CONFIRMED, Outcome.CONFIRMED], list(second), "the second call's"
    )
    expect([], list(third), "the third call's")


@GROUP.clause("cancelling a publish does not change later outcomes")
async def _cancelled(ctx: CheckContext) -> None:
    async with ctx.transport.publisher() as publisher:
        cancelled = asyncio.ensure_future(publisher.publish([ctx.to_queue()] * 20))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        outcomes = await publisher.publish([ctx.to_queue(b"later")] * 3)
        expect([Outcome.CONFIRMED] * 3, list(outcomes), "the next outcomes")
        expect(True, publisher.is_open, "is_open")


@GROUP.clause("a closed publisher raises SessionClosed")
async def _publisher_closed(ctx: CheckContext) -> None:
    async with ctx.transport.publisher() as publisher:
        expect(True, publisher.is_open, "is_open inside")
    expect(False, publisher.is_open, "is_open outside")
    with expect_error(SessionClosed, "publishing after the end"):
        await publisher.publish([ctx.to_queue()])
    await ctx.expect_messages([])


# --- properties and copies ------------------------------------------------------------


@GROUP.clause("properties arrive unchanged, and absent ones stay absent", "carries_properties")
async def _properties(ctx: CheckContext) -> None:
    all_of_them = Publication(
        b"1",
        routing_key=ctx.queue,
        expiration=600,
        **{
            name: getattr(_all_properties(), name)
            for name in Properties.__slots__
            if name not in {"expiration", "cluster_id", "undecodable"}
        },
    )
    full, bare = await _roundtrip(ctx, all_of_them, ctx.to_queue(b"2"))
    expect(_all_properties(), _sent_properties(full), "the full properties")
    expect(Properties(delivery_mode=2), _sent_properties(bare), "the default properties")
    expect(ctx.queue, full.routing_key, "the routing key")


@GROUP.clause("a copy has the original's body and headers, without `drop` and with `add`")
async def _copied(ctx: CheckContext) -> None:
    await ctx.publish(
        Publication(b"1", routing_key=ctx.queue, headers={"keep": "a", "drop": "b", "more": "c"})
    )
    async with ctx.read() as reader:
        [message] = await reader.take(1)
        copy = Copy(message, "", ctx.queue, {"more": "d", "new": "e"}, frozenset({"drop"}))
        expect([Outcome.CONFIRMED], await ctx.publish(copy), "the outcome")
        [copied] = await reader.take(1)
        expect(message.body, copied.body, "the body")
        expect(
            {"keep": "a", "more": "d", "new": "e"}, _sent_properties(copied).headers, "the headers"
        )


@GROUP.clause("a copy of a copy counts retries", "carries_properties")
async def _counts(ctx: CheckContext) -> None:
    await ctx.harness.put([b"1"])
    async with ctx.read() as reader:
        for count in range(3):
            [message] = await reader.take(1)
            expect(count, message.retry_count, "retry_count")
            copy = Copy(message, "", ctx.queue, {"x-retry-count": count + 1})
            expect([Outcome.CONFIRMED], await ctx.publish(copy), "the outcome")


@GROUP.clause(
    "a copy keeps all properties, even of a message from another transport", "carries_properties"
)
async def _copied_properties(ctx: CheckContext) -> None:
    elsewhere = Copy(_original(_all_properties()), "", ctx.queue, {})
    bare = Copy(_original(Properties(), b"plain"), "", ctx.queue, {})
    full, plain = await _roundtrip(ctx, elsewhere, bare)
    expect(_all_properties(), _sent_properties(full), "the properties of the first copy")
    expect(Properties(), _sent_properties(plain), "the properties of the bare copy")
    await ctx.harness.take(ctx.queue)
    [again] = await _roundtrip(ctx, Copy(full, "", ctx.queue, {"add": "x"}, frozenset({"drop"})))
    headers = {**(_all_properties().headers or {}), "add": "x"}
    del headers["drop"]
    expect(
        replace(_all_properties(), headers=headers),
        _sent_properties(again),
        "the properties of the second copy",
    )


@GROUP.clause("a copy keeps, drops or replaces its expiration", "carries_properties")
async def _expiration(ctx: CheckContext) -> None:
    def copy(body: bytes, *, keep: bool, expiration: str | None = None) -> Copy:
        return Copy(
            _original(_all_properties(), body),
            "",
            ctx.queue,
            {},
            keep_expiration=keep,
            expiration=expiration,
        )

    kept, without, other = await _roundtrip(
        ctx,
        copy(b"1", keep=True),
        copy(b"2", keep=False),
        copy(b"3", keep=False, expiration="700000"),
    )
    found = [each.properties.expiration for each in (kept, without, other)]
    expect(["600000", None, "700000"], found, "the expirations")


@GROUP.clause("a copy that no queue is bound for is RETURNED", "returns_unroutable")
async def _copy_returned(ctx: CheckContext) -> None:
    copy = Copy(_original(_all_properties()), "", ctx.harness.fresh, {})
    expect([Outcome.RETURNED], await ctx.publish(copy), "the outcome")


@GROUP.clause("a copy does not carry another user's user_id", "checks_users", "carries_properties")
async def _other_user(ctx: CheckContext) -> None:
    original = _original(Properties(user_id=_OTHER_USER, message_id="id"))
    [copied] = await _roundtrip(ctx, Copy(original, "", ctx.queue, {}))
    expect((None, "id"), (copied.user_id, copied.message_id), "user_id and message_id")


@GROUP.clause(
    "a copy whose headers don't fit is UNPUBLISHABLE, and its neighbours are published",
    "limits_headers",
)
async def _too_large(ctx: CheckContext) -> None:
    original = _original(Properties())
    too_large = Copy(original, "", ctx.queue, {"x": "x" * 200_000})
    async with ctx.transport.publisher() as publisher:
        outcomes = list(
            await publisher.publish([ctx.to_queue(b"1"), too_large, ctx.to_queue(b"2")])
        )
        expect(True, publisher.is_open, "is_open")
    expected = [Outcome.CONFIRMED, Outcome.UNPUBLISHABLE, Outcome.CONFIRMED]
    expect(expected, outcomes, "the outcomes")
    await ctx.expect_messages([b"1", b"2"])


@GROUP.clause("a copy leaves out headers that it doesn't need, until it fits", "limits_headers")
async def _shortened(ctx: CheckContext) -> None:
    ours = {"needed": "a", "spare": "s" * 100_000}
    small = _original(Properties(headers={"theirs": "t" * 100_000, "more": 1}), b"1")
    large = _original(Properties(headers={"theirs": "t" * 200_000, "more": 1}), b"2")
    first, second = await _roundtrip(
        ctx,
        Copy(small, "", ctx.queue, ours, spare=("spare",)),
        Copy(large, "", ctx.queue, ours, spare=("spare",), may_omit=True),
    )
    found = [set(_sent_properties(each).headers or ()) for each in (first, second)]
    expect({"theirs", "more", "needed"}, found[0], "the headers of the first copy")
    names = {"more", "needed", "spare", OMITTED}
    expect(names, found[1], "the headers of the second copy")
    expect(["theirs"], second.headers[OMITTED], "the list of what is left out")
