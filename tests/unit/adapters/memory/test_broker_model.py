"""A state machine compares the broker with a simple model of one queue.

The model is written from RabbitMQ's rules and not from the code: two lists, a dictionary and a
clock. Clients may be cut off, make mistakes, and be slow.
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
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from tests.unit.adapters.memory.client import Client, bodies

QUEUE, DEAD = "work", "dead"


@dataclass
class QueueOptions:
    """The arguments of the queue, drawn once."""

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


queue_options = st.builds(
    QueueOptions,
    version=st.sampled_from(["3.10", "4.0", "4.3"]),
    quorum=st.booleans(),
    dead_letters=st.booleans(),
    ttl=st.sampled_from([None, None, 5.0]),
    max_length=st.sampled_from([None, None, 0, 3]),
    refuses=st.booleans(),
    limit=st.sampled_from([None, 0, 2]),
)


@dataclass
class ModelClient:
    """What the model expects of one client: unacked tags and bodies, in the order of delivery."""

    client: Client
    prefetch: int = 0
    consuming: bool = False
    tags: dict[int, bytes] = field(default_factory=dict)


class BrokerMachine(RuleBasedStateMachine):
    """Publishers, consumers and faults on one queue."""

    clients = Bundle("clients")

    @initialize(options=queue_options)
    def open(self, options: QueueOptions) -> None:
        self.options = options
        self.broker = Broker(options.version)
        self.publisher = Client(self.broker, "publisher")
        self.publisher.queue(DEAD)
        self.publisher.queue(QUEUE, **options.arguments)
        self.models: dict[str, ModelClient] = {}
        self.now = 0.0
        self.count = 0
        self.returned: list[bytes] = []
        self.fresh: list[bytes] = []
        self.expiries: dict[bytes, float] = {}
        self.return_counts: dict[bytes, int] = {}
        self.redelivered: set[bytes] = set()
        self.acked: list[bytes] = []
        self.dead: list[tuple[bytes, str]] = []
        self.refused: list[bytes] = []
        self.was_full = False
        self.seen_deliveries = 0
        self.client_count = 0

    # -- the model --

    @property
    def ready(self) -> list[bytes]:
        """The ready messages, in the order of delivery."""
        return self.returned + self.fresh

    def remove_ready(self, body: bytes) -> None:
        (self.returned if body in self.returned else self.fresh).remove(body)

    def expire(self) -> None:
        while self.ready and self.expiries.get(self.ready[0], self.now + 1) <= self.now:
            body = self.ready[0]
            self.remove_ready(body)
            self.dead.append((body, "expired"))

    def requeue(self, *bodies: bytes, counts: bool, lost: bool) -> None:
        self.redelivered.update(bodies)
        if not self.options.quorum:
            self.fresh = sorted([*self.fresh, *bodies], key=int)
            # Before it looks at their age, a classic queue drops messages beyond its length.
            self.shorten()
            return
        for body in bodies:
            self.requeue_counted(body, counts=counts, lost=lost)

    def requeue_counted(self, body: bytes, *, counts: bool, lost: bool) -> None:
        options = self.options
        self.return_counts[body] = self.return_counts.get(body, 0) + counts
        if (
            options.effective_limit is not None
            and self.return_counts[body] > options.effective_limit
        ):
            self.dead.append((body, "delivery_limit"))
        elif options.version == "3.10" and options.effective_limit is None and not lost:
            self.fresh.append(body)
        else:
            self.returned.append(body)

    def is_full(self) -> bool:
        limit = self.options.max_length
        if limit is None or not self.options.refuses:
            return False
        if not self.options.quorum:
            return len(self.ready) + 1 > limit
        # It notices that it is full only when it is beyond its limit, and then waits for some room.
        self.was_full = len(self.ready) > (int(limit * 0.8) if self.was_full else limit)
        return self.was_full

    def has_capacity(self, model: ModelClient) -> bool:
        return model.consuming and (model.prefetch == 0 or len(model.tags) < model.prefetch)

    def check_deliveries(self, before_expiry: bytes | None = None) -> None:
        """Compare the deliveries with the ready messages, and drop messages beyond the length.

        Args:
            before_expiry: The message just published; a waiting consumer gets it before it expires.
        """
        delivered = [
            event.body
            for event in self.broker.journal.events
            if event.kind is EventKind.DELIVERED and event.queue == QUEUE
        ][self.seen_deliveries :]
        self.seen_deliveries += len(delivered)
        if before_expiry is not None and not delivered and not self.options.quorum:
            self.shorten()
        if not (before_expiry is not None and self.ready == [before_expiry] == delivered):
            self.expire()
        for body in delivered:
            assert body is not None
            assert self.ready[:1] == [body], "delivered out of order"
            self.remove_ready(body)
            self.expire()
        arrived: list[bytes] = []
        for model in self.models.values():
            for delivery in model.client.deliveries():
                assert model.consuming
                assert delivery.tag > max(model.tags, default=0)
                assert delivery.redelivered == (delivery.body in self.redelivered)
                model.tags[delivery.tag] = delivery.body
                arrived.append(delivery.body)
        assert sorted(arrived) == sorted(body for body in delivered if body is not None)
        self.shorten()
        self.is_full()

    def shorten(self) -> None:
        limit = self.options.max_length
        while limit is not None and not self.options.refuses and len(self.ready) > limit:
            body = self.ready[0]
            self.remove_ready(body)
            self.dead.append((body, "maxlen"))
            self.expire()

    # -- rules --

    @rule(own_ttl=st.sampled_from([None, None, 0, 3]))
    def publish(self, own_ttl: int | None) -> None:
        self.count += 1
        body = b"%d" % self.count
        expiration = None if own_ttl is None else str(own_ttl * 1000)
        is_full = self.is_full()
        outcome = self.publisher.publish(body, QUEUE, mandatory=True, expiration=expiration)
        assert outcome == ("refused" if is_full else "confirmed")
        if is_full:
            self.refused.append(body)
            return
        self.fresh.append(body)
        lives = [ttl for ttl in (own_ttl, self.options.ttl) if ttl is not None]
        if lives:
            self.expiries[body] = self.now + min(lives)
        self.check_deliveries(before_expiry=body)

    @rule(target=clients, prefetch=st.integers(0, 3))
    def consume(self, prefetch: int) -> str:
        self.client_count += 1
        name = f"client-{self.client_count}"
        client = Client(self.broker, name)
        self.models[name] = ModelClient(client, prefetch, consuming=True)
        client.consume(QUEUE, prefetch=prefetch)
        self.check_deliveries()
        return name

    @rule(name=clients)
    def cancel(self, name: str) -> None:
        model = self.models[name]
        model.client.channel.cancel("consumer")
        model.consuming = False
        self.check_deliveries()

    def chosen(self, name: str, at: int, *, multiple: bool) -> tuple[Client, int, list[bytes]]:
        model = self.models[name]
        tag = list(model.tags)[at % len(model.tags)]
        tags = [each for each in model.tags if each <= tag] if multiple else [tag]
        return model.client, tag, [model.tags.pop(each) for each in tags]

    @rule(name=clients, at=st.integers(0, 9), multiple=st.booleans())
    def ack(self, name: str, at: int, multiple: bool) -> None:
        if not self.models[name].tags:
            return
        client, tag, settled = self.chosen(name, at, multiple=multiple)
        client.channel.ack(tag, multiple=multiple)
        self.acked += settled
        self.check_deliveries()

    @rule(name=clients, at=st.integers(0, 9), multiple=st.booleans(), requeue=st.booleans())
    def nack(self, name: str, at: int, multiple: bool, requeue: bool) -> None:
        if not self.models[name].tags:
            return
        client, tag, settled = self.chosen(name, at, multiple=multiple)
        client.channel.nack(tag, multiple=multiple, requeue=requeue)
        if requeue:
            self.requeue(*settled, counts=self.options.version != "4.3", lost=False)
        else:
            self.dead += [(body, "rejected") for body in settled]
        self.check_deliveries()

    @rule(name=clients, at=st.integers(0, 9), requeue=st.booleans())
    def reject(self, name: str, at: int, requeue: bool) -> None:
        if not self.models[name].tags:
            return
        client, tag, (body,) = self.chosen(name, at, multiple=False)
        client.channel.reject(tag, requeue=requeue)
        if requeue:
            self.requeue(body, counts=True, lost=False)
        else:
            self.dead.append((body, "rejected"))
        self.check_deliveries()

    def close(self, name: str) -> None:
        self.requeue(*self.models.pop(name).tags.values(), counts=True, lost=True)

    @rule(name=consumes(clients), how=st.sampled_from(["cut", "close", "mistake"]))
    def leave(self, name: str, how: str) -> None:
        client = self.models[name].client
        if how == "cut":
            assert self.broker.cut(name) == 1
        elif how == "close":
            client.channel.close()
        else:
            with pytest.raises(Refusal, match="unknown delivery tag 99999"):
                client.channel.ack(99_999)
        assert client.channel.close_reason is not None
        self.close(name)
        self.check_deliveries()

    @precondition(lambda self: self.models)
    @rule()
    def cancel_all(self) -> None:
        assert self.broker.cancel_consumers(QUEUE) == sum(
            model.consuming for model in self.models.values()
        )
        for model in self.models.values():
            model.consuming = False
        self.check_deliveries()

    @rule(seconds=st.sampled_from([0.5, 2, 10]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.broker.advance(self.now)
        self.check_deliveries()

    # -- invariants --

    @invariant()
    def every_message_is_in_exactly_one_place(self) -> None:
        ready = bodies(self.broker, QUEUE)
        unacked = [message.body for message in self.broker.unacked(QUEUE)]
        assert ready == self.ready
        unsettled = [body for model in self.models.values() for body in model.tags.values()]
        assert sorted(unacked) == sorted(unsettled)
        dead_bodies = [body for body, _ in self.dead]
        everywhere = ready + unacked + self.acked + dead_bodies + self.refused
        assert sorted(everywhere, key=int) == [b"%d" % n for n in range(1, self.count + 1)]

    @invariant()
    def dead_letters_and_dropped_messages_are_as_expected(self) -> None:
        dead_lettered = [
            (message.body, message.headers["x-death"][0]["reason"])
            for message in self.broker.ready(DEAD)
        ]
        dropped = [
            (event.body, event.detail) for event in self.broker.journal.of(EventKind.DROPPED)
        ]
        expected = (self.dead, []) if self.options.dead_letters else ([], self.dead)
        assert (sorted(dead_lettered), sorted(dropped)) == (
            sorted(expected[0]),
            sorted(expected[1]),
        )

    @invariant()
    def the_prefetch_is_used_and_never_exceeded(self) -> None:
        for model in self.models.values():
            assert model.prefetch == 0 or len(model.tags) <= model.prefetch
            assert not (self.ready and self.has_capacity(model)), (
                "a message is ready, and a consumer has capacity"
            )
            assert model.client.channel.unsettled == tuple(model.tags)

    @invariant()
    def the_next_event_is_the_expiry_of_the_first_message(self) -> None:
        heads = [self.expiries[body] for body in self.ready[:1] if body in self.expiries]
        assert self.broker.next_event == min(heads, default=None)


def test_every_message_is_in_exactly_one_place():
    """After any sequence of operations, on every version and type of queue."""
    run_state_machine_as_test(BrokerMachine)
