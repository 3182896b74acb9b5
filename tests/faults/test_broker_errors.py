"""Errors inside a running broker: queues fail, channels close, users are refused."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.conftest import OVER_091, OVER_10
from tests.integration.helpers import add_user, change_password, parse_version, until

pytestmark = pytest.mark.needs_node


@pytest.mark.parametrize(
    ("arguments", "fault", "then"),
    [
        (
            {"x-cancel-on-ha-failover": True},
            "consumer cancelled by the broker",
            "recovered it and cancelled its consumers; their channels stayed open.",
        ),
        (
            {},
            "queue's process killed",
            "recovered it and its consumers; no client was notified.",
        ),
    ],
    ids=["cancelled", "recovered"],
)
@pytest.mark.parametrize("wire", OVER_091)
async def test_a_queue_that_crashes_loses_nothing(
    run, wire, rabbitmq, broker, name, arguments, fault, then
) -> None:
    """Whether its consumers are cancelled, or not notified at all."""
    if not arguments and parse_version(broker) >= (4, 0):
        pytest.skip(f"RabbitMQ {broker.version} cancels the consumers of a queue that has failed")
    did = f"The process of the queue was killed inside the broker, which {then}"
    async with run(fault, did, wire=wire, consumer_arguments=arguments) as trial:
        trial.ends()
        await asyncio.to_thread(
            rabbitmq.eval,
            "{ok, Q} = rabbit_amqqueue:lookup("
            f'rabbit_misc:r(<<"/">>, queue, <<"{name}">>)), exit(amqqueue:get_pid(Q), kill).',
        )
        if arguments:
            await trial.breaks()
        else:
            trial.ends()
        await trial.recovers(only_new=bool(arguments))
        await trial.flows()
    assert bool(arguments) == any("cancel" in why for _, why in trial.record.losses)


@pytest.mark.parametrize("wire", OVER_091)
async def test_channels_closed_by_an_error_are_opened_again(run, wire, rabbitmq) -> None:
    """406, as after an ack of an unknown tag, for consuming and publishing channels."""
    async with run(
        "channels closed with 406",
        "Every channel was made to acknowledge an unknown delivery tag, inside the broker, which"
        " closes it.",
        wire=wire,
    ) as trial:
        trial.ends()
        await asyncio.to_thread(
            rabbitmq.eval,
            "[rabbit_channel_common:do(Pid, {'basic.ack', 999999999, false})"
            " || Pid <- rabbit_channel:list()].",
        )
        await trial.breaks()
        await trial.recovers()
    assert any("PRECONDITION_FAILED" in why for _, why in trial.record.losses)


@pytest.mark.parametrize("wire", [OVER_10], indirect=True)
async def test_a_quorum_queue_that_crashes_loses_nothing(run, wire, rabbitmq, name) -> None:
    """Its sessions aren't notified."""
    async with run(
        "quorum queue's process killed",
        "The process of the queue's leader was killed inside the broker, which started it again.",
        wire=wire,
    ) as trial:
        trial.ends()
        await asyncio.to_thread(rabbitmq.eval, f"exit(whereis('%2F_{name}'), kill).")
        await trial.flows()
        await trial.carries_on()


@pytest.mark.parametrize("wire", [OVER_10], indirect=True)
async def test_a_session_that_fails_in_the_broker_is_opened_again(run, wire, rabbitmq) -> None:
    """Over AMQP 1.0, or for a while over 0-9-1: a message may be the cause."""
    async with run(
        "AMQP 1.0 sessions killed",
        "The processes of all AMQP 1.0 sessions were killed inside the broker.",
        wire=wire,
    ) as trial:
        trial.ends()
        await asyncio.to_thread(
            rabbitmq.eval, "[exit(Pid, kill) || Pid <- rabbit_amqp_session:list_local()]."
        )
        await trial.breaks()
        await trial.recovers()


async def test_temporarily_refused_credentials_are_retried(run, wire, rabbitmq, amqp_url) -> None:
    """With backoff: after a first success, a refusal is not fatal."""
    await asyncio.to_thread(add_user, rabbitmq, wire, "old", ".*", ".*", ".*")
    async with run(
        "credentials changed",
        "The user's password was changed and all connections were closed; after six refusals it"
        " was changed back.",
        url=amqp_url.replace("guest:guest", f"{wire}:old"),
        wire=wire,
    ) as trial:
        await asyncio.to_thread(change_password, rabbitmq, wire, "new")
        await asyncio.to_thread(rabbitmq.close_all_connections, "new password")
        await until(
            lambda: sum("ACCESS_REFUSED" in why for _, why in trial.record.losses) >= 6,
            what=lambda: trial.record.losses,
        )
        assert trial.consumer.is_running
        assert not trial.consumer.is_healthy
        await asyncio.to_thread(change_password, rabbitmq, wire, "old")
        trial.ends()
        await trial.recovers()
    # Two workers, and pauses of 0.5, 1, 2, 2 … s at most: a hot loop would have tried hundreds.
    assert len(trial.record.losses) < 50
