"""Every message is in exactly one place, whatever clients do.

The oracle is a second, plainer broker of one queue, written from the rules and not from the code:
two lists, a dictionary and a clock. Clients may be cut, mistaken and slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.faults import EventKind
from aio_pika_batch.adapters.memory.refusals import Refusal
from tests.unit.adapters.memory.client import Client, bodies

QUEUE, DEAD = "work", "dead"


@dataclass
class Plan:
    """What the queue is like; drawn once."""

    version: str
    quorum: bool
    dead_letters: bool
    ttl: float | None
    max_length: int | None
    refuses: bool
    limit: int | None

    @property
    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"queue_type": "quorum" if self.quorum else "classic"}
        if self.dead_letters:
            arguments |= {"dead_letter_exchange": "", "dead_letter_routing_key": DEAD}
        if self.ttl is not None:
            arguments["message_ttl"] = int(self.ttl * 1000)
        if self.max_length is not None:
            arguments["max_length"] = self.max_length
        if self.refuses:
            arguments["overflow"] = "reject-publish"
        if self.quorum and self.limit is not None:
            arguments["delivery_limit"] = self.limit
        return arguments

    @property
    def effective_limit(self) -> int | None:
        if not self.quorum:
            return None
        if self.limit is not None:
            return self.limit
        return None if self.version == "3.10" else 20


plans = st.builds(
    Plan,
    version=st.sampled_from(["3.10", "4.0", "4.3"]),
    quorum=st.booleans(),
    dead_letters=st.booleans(),
    ttl=st.sampled_from([None, None, 5.0]),
    max_length=st.sampled_from([None, None, 0, 3]),
    refuses=st.booleans(),
    limit=st.sampled_from([None, 0, 2]),
)


@dataclass
class Held:
    """What the oracle thinks that one client holds: tag and body, in the order of delivery."""

    client: Client
    prefetch: int = 0
    consuming: bool = False
    tags: dict[int, bytes] = field(default_factory=dict)


class BrokerMachine(RuleBasedStateMachine):
    """Publishers, consumers and accidents on one queue."""

    clients = Bundle("clients")

    @initialize(plan=plans)
    def open(self, plan: Plan) -> None:
        self.plan = plan
        self.broker = Broker(plan.version)
        self.publisher = Client(self.broker, "publisher")
        self.publisher.queue(DEAD)
        self.publisher.queue(QUEUE, **plan.arguments)
        self.held: dict[str, Held] = {}
        self.now = 0.0
        self.count = 0
        self.returned: list[bytes] = []
        self.fresh: list[bytes] = []
        self.expiries: dict[bytes, float] = {}
        self.in_vain: dict[bytes, int] = {}
        self.came_back: set[bytes] = set()
        self.acked: list[bytes] = []
        self.dead: list[tuple[bytes, str]] = []
        self.refused: list[bytes] = []
        self.seen_events = 0
        self.clients_so_far = 0

    # -- what the rules say --

    @property
    def line(self) -> list[bytes]:
        """Who is next, and next after that."""
        return self.returned + self.fresh

    def out_of_line(self, body: bytes) -> None:
        (self.returned if body in self.returned else self.fresh).remove(body)

    def expire(self) -> None:
        while self.line and self.expiries.get(self.line[0], self.now + 1) <= self.now:
            body = self.line[0]
            self.out_of_line(body)
            self.dead.append((body, "expired"))

    def comes_back(self, body: bytes, *, counts: bool, lost: bool) -> None:
        plan = self.plan
        self.came_back.add(body)
        if not plan.quorum:
            self.fresh = sorted([*self.fresh, body], key=int)
            return
        self.in_vain[body] = self.in_vain.get(body, 0) + counts
        if plan.effective_limit is not None and self.in_vain[body] > plan.effective_limit:
            self.dead.append((body, "delivery_limit"))
        elif plan.version == "3.10" and plan.effective_limit is None and not lost:
            self.fresh.append(body)
        else:
            self.returned.append(body)

    def full(self) -> bool:
        limit = self.plan.max_length
        if limit is None or not self.plan.refuses:
            return False
        return len(self.line) + (0 if self.plan.quorum else 1) > limit

    def room(self, held: Held) -> bool:
        return held.consuming and (held.prefetch == 0 or len(held.tags) < held.prefetch)

    def follow(self, before_expiry: bytes | None = None) -> None:
        """Check what was delivered against the line, and cut the line to its length.

        Args:
            before_expiry: What arrived now, and is delivered at once if somebody waits for it.
        """
        delivered = [
            event.body
            for event in self.broker.journal.events
            if event.kind is EventKind.DELIVERED and event.queue == QUEUE
        ][self.seen_events :]
        self.seen_events += len(delivered)
        if not (before_expiry is not None and self.line == [before_expiry] == delivered):
            self.expire()
        for body in delivered:
            assert body is not None
            assert self.line[:1] == [body], "out of turn"
            self.out_of_line(body)
            self.expire()
        arrived: list[bytes] = []
        for held in self.held.values():
            for delivery in held.client.deliveries():
                assert held.consuming
                assert delivery.tag > max(held.tags, default=0)
                assert delivery.redelivered == (delivery.body in self.came_back)
                held.tags[delivery.tag] = delivery.body
                arrived.append(delivery.body)
        assert sorted(arrived) == sorted(body for body in delivered if body is not None)
        limit = self.plan.max_length
        while limit is not None and not self.plan.refuses and len(self.line) > limit:
            body = self.line[0]
            self.out_of_line(body)
            self.dead.append((body, "maxlen"))
            self.expire()

    # -- what happens --

    @rule(own_ttl=st.sampled_from([None, None, 0, 3]))
    def publish(self, own_ttl: int | None) -> None:
        self.count += 1
        body = b"%d" % self.count
        expiration = None if own_ttl is None else str(own_ttl * 1000)
        full = self.full()
        said = self.publisher.publish(body, QUEUE, mandatory=True, expiration=expiration)
        assert said == ("refused" if full else "confirmed")
        if full:
            self.refused.append(body)
            return
        self.fresh.append(body)
        lives = [ttl for ttl in (own_ttl, self.plan.ttl) if ttl is not None]
        if lives:
            self.expiries[body] = self.now + min(lives)
        self.follow(before_expiry=body)

    @rule(target=clients, prefetch=st.integers(0, 3))
    def consume(self, prefetch: int) -> str:
        self.clients_so_far += 1
        name = f"client-{self.clients_so_far}"
        client = Client(self.broker, name)
        self.held[name] = Held(client, prefetch, consuming=True)
        client.consume(QUEUE, prefetch=prefetch)
        self.follow()
        return name

    @rule(name=clients)
    def cancel(self, name: str) -> None:
        held = self.held[name]
        held.client.channel.cancel("consumer")
        held.consuming = False
        self.follow()

    def chosen(self, name: str, at: int, *, multiple: bool) -> tuple[Client, int, list[bytes]]:
        held = self.held[name]
        tag = list(held.tags)[at % len(held.tags)]
        tags = [each for each in held.tags if each <= tag] if multiple else [tag]
        return held.client, tag, [held.tags.pop(each) for each in tags]

    @rule(name=clients, at=st.integers(0, 9), multiple=st.booleans())
    def ack(self, name: str, at: int, multiple: bool) -> None:
        if not self.held[name].tags:
            return
        client, tag, settled = self.chosen(name, at, multiple=multiple)
        client.channel.ack(tag, multiple=multiple)
        self.acked += settled
        self.follow()

    @rule(name=clients, at=st.integers(0, 9), multiple=st.booleans(), requeue=st.booleans())
    def nack(self, name: str, at: int, multiple: bool, requeue: bool) -> None:
        if not self.held[name].tags:
            return
        client, tag, settled = self.chosen(name, at, multiple=multiple)
        client.channel.nack(tag, multiple=multiple, requeue=requeue)
        for body in settled:
            if requeue:
                self.comes_back(body, counts=self.plan.version != "4.3", lost=False)
            else:
                self.dead.append((body, "rejected"))
        self.follow()

    @rule(name=clients, at=st.integers(0, 9), requeue=st.booleans())
    def reject(self, name: str, at: int, requeue: bool) -> None:
        if not self.held[name].tags:
            return
        client, tag, (body,) = self.chosen(name, at, multiple=False)
        client.channel.reject(tag, requeue=requeue)
        if requeue:
            self.comes_back(body, counts=True, lost=False)
        else:
            self.dead.append((body, "rejected"))
        self.follow()

    def gone(self, name: str) -> None:
        for body in self.held.pop(name).tags.values():
            self.comes_back(body, counts=True, lost=True)

    @rule(name=consumes(clients), how=st.sampled_from(["cut", "close", "mistake"]))
    def leave(self, name: str, how: str) -> None:
        client = self.held[name].client
        if how == "cut":
            assert self.broker.cut(name) == 1
        elif how == "close":
            client.channel.close()
        else:
            with pytest.raises(Refusal, match="unknown delivery tag 99999"):
                client.channel.ack(99_999)
        assert client.channel.close_reason is not None
        self.gone(name)
        self.follow()

    @precondition(lambda self: self.held)
    @rule()
    def cancel_all(self) -> None:
        assert self.broker.cancel_consumers(QUEUE) == sum(
            held.consuming for held in self.held.values()
        )
        for held in self.held.values():
            held.consuming = False
        self.follow()

    @rule(seconds=st.sampled_from([0.5, 2, 10]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.broker.advance(self.now)
        self.follow()

    # -- what is always true --

    @invariant()
    def everything_is_in_exactly_one_place(self) -> None:
        ready = bodies(self.broker, QUEUE)
        unacked = [message.body for message in self.broker.unacked(QUEUE)]
        assert ready == self.line
        in_hand = [body for held in self.held.values() for body in held.tags.values()]
        assert sorted(unacked) == sorted(in_hand)
        dead_bodies = [body for body, _ in self.dead]
        everywhere = ready + unacked + self.acked + dead_bodies + self.refused
        assert sorted(everywhere, key=int) == [b"%d" % n for n in range(1, self.count + 1)]

    @invariant()
    def the_dead_are_where_they_belong(self) -> None:
        buried = [
            (message.body, message.headers["x-death"][0]["reason"])
            for message in self.broker.ready(DEAD)
        ]
        dropped = [
            (event.body, event.detail) for event in self.broker.journal.of(EventKind.DROPPED)
        ]
        expected = (self.dead, []) if self.plan.dead_letters else ([], self.dead)
        assert (sorted(buried), sorted(dropped)) == (sorted(expected[0]), sorted(expected[1]))

    @invariant()
    def nobody_has_too_many_and_nobody_waits_in_vain(self) -> None:
        for held in self.held.values():
            assert held.prefetch == 0 or len(held.tags) <= held.prefetch
            assert not (self.line and self.room(held)), "a message waits, and so does a consumer"
            assert held.client.channel.unsettled == tuple(held.tags)

    @invariant()
    def the_next_event_is_the_heads(self) -> None:
        heads = [self.expiries[body] for body in self.line[:1] if body in self.expiries]
        assert self.broker.next_event == min(heads, default=None)


def test_the_broker_keeps_its_books():
    """In stories of any length, on every version and kind of queue."""
    run_state_machine_as_test(BrokerMachine)
