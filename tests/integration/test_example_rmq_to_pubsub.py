"""Google Pub/Sub gets all good messages from its real client, those of a key in order."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import grpc
import pytest
from google.cloud import pubsub_v1
from google.cloud.pubsub_v1.publisher._sequencer.ordered_sequencer import OrderedSequencer

from aio_pika_batch import MessageResult, Nack, Publication, Requeue
from aio_pika_batch.testing import make_message, process
from tests.integration.helpers import PATIENCE, QUEUE_TYPES, holds, take_all
from tests.support.pubsub import emulator, emulator_jar, ours

FOLDER = Path(__file__).parents[2] / "examples" / "rmq_to_pubsub"
MAIN = runpy.run_path(str(FOLDER / "main.py"))
KEY = MAIN["KEY"]
JAR = emulator_jar()


@pytest.fixture
def pubsub(monkeypatch):
    """A server of ours, found by the client as an emulator is."""
    with ours() as (host, service):
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", host)
        yield service


def run(url: str, queue: str, **settings: str) -> str:
    """Run the example on its samples; what it prints."""
    own = {"URL": url, "QUEUE_NAME": queue, "DEAD_LETTER_QUEUE": f"{queue}.dead"}
    own |= {"REQUEUE_DELAY": "0.1", **settings}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "main.py"), "--samples"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
        env={**os.environ, **{f"RMQ_TO_PUBSUB_{key}": value for key, value in own.items()}},
    )
    sys.stderr.write(done.stderr)  # shown if what was published turns out to be wrong
    assert 0 == done.returncode, done.stderr
    assert done.stdout.endswith("248 messages published, 2 dead letters\n"), done.stderr
    return done.stdout


def by_key(messages) -> dict[str, list[bytes]]:
    """The bodies of each key, in their order."""
    found = defaultdict(list)
    for key, body in messages:
        found[key].append(body)
    return dict(found)


def samples() -> dict[str, list[bytes]]:
    """What should be published."""
    return by_key(
        ((each.headers or {}).get(KEY, ""), each.body) for each in MAIN["SAMPLES"] if each.body
    )


FAILURES = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]


@QUEUE_TYPES
async def test_each_key_arrives_in_its_order_in_spite_of_failures(
    amqp_url, channel, name, pubsub, queue_type
) -> None:
    """Failed requests are repeated in their place; two empty messages are dead letters."""
    pubsub.failures.extend(FAILURES * 3)

    run(amqp_url, name, QUEUE_TYPE=queue_type)

    assert samples() == by_key((each.ordering_key, each.data) for each in pubsub.messages)
    assert not pubsub.failures
    dead = await take_all(channel, f"{name}.dead", 2)
    assert [b"", b""] == [each.body for each in dead]
    assert {"google.api_core.exceptions.InvalidArgument"} == {
        each.headers["x-exception-type"] for each in dead
    }
    await holds(amqp_url, name, 0)


@pytest.mark.long
@pytest.mark.skipif(JAR is None, reason="Google's emulator is not installed")
def test_googles_emulator_takes_the_same(monkeypatch) -> None:
    """Published, and pulled again by Google's own subscriber, in order."""
    with emulator(JAR) as host:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", host)
        publisher, subscriber = pubsub_v1.PublisherClient(), pubsub_v1.SubscriberClient()
        topic = publisher.topic_path("example", "outgoing")
        subscription = subscriber.subscription_path("example", "reader")
        publisher.create_topic(name=topic)
        ordered = {"name": subscription, "topic": topic, "enable_message_ordering": True}
        subscriber.create_subscription(request=ordered)

        run("memory://", "outgoing")

        got = []
        while len(got) < 248:
            pulled = subscriber.pull(subscription=subscription, max_messages=300, timeout=20)
            for each in pulled.received_messages:
                got.append((each.message.ordering_key, each.message.data))
                subscriber.acknowledge(subscription=subscription, ack_ids=[each.ack_id])
        subscriber.close()
        publisher.stop()

    assert samples() == by_key(got)


def forwarder(**settings):
    """The example's consumer, with a queue in memory."""
    return MAIN["Forwarder"](MAIN["Settings"](url="memory://", **settings))


async def test_one_bad_message_costs_one_message(pubsub) -> None:
    """The request is refused as a whole, and repeated without it."""
    outcome = await process(forwarder(), [b"one", b"", b"three"])

    assert [b"one", b"three"] == [each.body for each in outcome.acked]
    assert [b""] == [each.body for each in outcome.dead_lettered]
    assert {b"one", b"three"} == {each.data for each in pubsub.messages}


async def test_a_batch_of_one_key_is_one_request(pubsub) -> None:
    """However many messages it holds, and in their order."""
    given = [make_message(b"%d" % n, headers={KEY: "k"}) for n in range(100)]

    # Long enough to hand over a hundred messages, on any machine.
    await process(forwarder(max_latency=1), given)

    [request] = pubsub.requests
    assert [each.body for each in given] == [each.data for each in request]


async def test_a_failed_request_takes_along_what_the_client_has_not_sent_yet(
    pubsub, monkeypatch
) -> None:
    """A batch that is handed over slowly becomes two requests; its order holds all the same."""
    publish = pubsub_v1.PublisherClient.publish
    given = [make_message(b"%d" % n, headers={KEY: "k"}) for n in range(10)]

    def interrupted(client, topic, body, **more):
        if body == b"4":  # the timer has sent the first four, and no answer has come
            assert pubsub.waiting.wait(30)
        future = publish(client, topic, body, **more)
        if body == b"9":
            pubsub.may_answer.set()
        return future

    monkeypatch.setattr(pubsub_v1.PublisherClient, "publish", interrupted)
    pubsub.may_answer.clear()
    pubsub.failures.append(grpc.StatusCode.UNAVAILABLE)
    outcome = await process(forwarder(), given)

    assert [each.body for each in given] == [each.data for each in pubsub.messages]
    assert given == outcome.acked
    assert [] == outcome.errors


async def test_messages_handed_over_before_the_client_pauses_their_key_wait(
    pubsub, monkeypatch
) -> None:
    """It knows that a request failed, and refuses others with an AssertionError until then."""
    publish, pause = pubsub_v1.PublisherClient.publish, OrderedSequencer._batch_done_callback
    given = [make_message(b"%d" % n, headers={KEY: "k"}) for n in range(10)]
    has_failed, is_refused = threading.Event(), threading.Event()
    refusals = []

    def interrupted(client, topic, body, **more):
        if body == b"4":  # the timer has sent the first four, and they fail
            assert has_failed.wait(30)
        try:
            return publish(client, topic, body, **more)
        except AssertionError:
            refusals.append(body)
            raise
        finally:
            if body == b"4":
                is_refused.set()

    def late(sequencer, success):
        has_failed.set()
        assert is_refused.wait(30)
        pause(sequencer, success)

    monkeypatch.setattr(pubsub_v1.PublisherClient, "publish", interrupted)
    monkeypatch.setattr(OrderedSequencer, "_batch_done_callback", late)
    pubsub.failures.append(grpc.StatusCode.UNAVAILABLE)
    outcome = await process(forwarder(), given)

    assert b"4" in refusals
    assert [each.body for each in given] == [each.data for each in pubsub.messages]
    assert given == outcome.acked
    assert [] == outcome.errors


async def test_a_bad_message_among_failures_keeps_the_order_of_its_key(pubsub) -> None:
    """Each message of the refused request is sent alone, and waits for those before it."""
    bodies = [b"0", b"1", b"", b"3", b"4", b"5"]
    given = [make_message(body, headers={KEY: "k"}) for body in bodies]
    # The request as a whole is refused for its empty message; then the second message fails.
    pubsub.failures.extend([None, None, grpc.StatusCode.UNAVAILABLE])

    outcome = await process(forwarder(max_latency=0.1), given)

    assert [b"0", b"1", b"3", b"4", b"5"] == [each.data for each in pubsub.messages]
    assert [b""] == [each.body for each in outcome.dead_lettered]


async def test_what_may_pass_is_tried_again(pubsub) -> None:
    """No topic, no permission, no service: REQUEUE, and the reason names it."""
    for code, name in (
        (grpc.StatusCode.UNAVAILABLE, "ServiceUnavailable"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "ResourceExhausted"),
        (grpc.StatusCode.PERMISSION_DENIED, "PermissionDenied"),
    ):
        pubsub.failures.append(code)
        outcome = await process(forwarder(), [b"one"])
        assert [Requeue(f"{name} from Pub/Sub")] == outcome.results


async def test_headers_become_attributes(pubsub) -> None:
    """Texts and the message's id; the ordering key is not among them."""
    message = make_message(b"x", headers={"tenant": "a", "n": 1, KEY: "k"}, message_id="m-1")

    outcome = await process(forwarder(), [message])

    assert [MessageResult.ACK] == outcome.results
    [published] = pubsub.messages
    assert {"tenant": "a", "message_id": "m-1"} == dict(published.attributes)
    assert "k" == published.ordering_key


async def test_what_is_too_large_is_a_dead_letter(pubsub) -> None:
    """The client itself refuses more than 10 MB."""
    outcome = await process(forwarder(), [b"x" * 10_000_001])

    assert [Nack] == [type(each) for each in outcome.results]
    assert [] == pubsub.messages


def test_samples_are_what_the_readme_says() -> None:
    """250, and two of them empty."""
    assert 250 == len(MAIN["SAMPLES"])
    assert all(isinstance(each, Publication) for each in MAIN["SAMPLES"])
    assert 2 == sum(not each.body for each in MAIN["SAMPLES"])
