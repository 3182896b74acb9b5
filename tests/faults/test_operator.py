"""What people do to a running consumer: they stop it, and they close, delete and declare things.

A selection of the faults that is quick enough to run with all other tests.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.helpers import until

pytestmark = pytest.mark.needs_node


async def test_a_graceful_stop_in_the_middle_of_the_load_duplicates_nothing(run, wire) -> None:
    """Stopped and started again, while messages come and are requeued."""
    async with run(
        "graceful stop",
        "The consumer was stopped under load, and started again, five times.",
        wire=wire,
    ) as trial:
        for _ in range(5):
            await trial.consumer.stop()
            trial.ends()
            await trial.consumer.start()
            await trial.recovers(anew=False)  # nothing is in hand after a stop
            await trial.flows()
    assert 0 == trial.figures.duplicated


async def test_connections_closed_by_an_operator_come_back(run, wire, rabbitmq) -> None:
    """The consumer's, its publisher's and everybody else's."""
    async with run(
        "connections closed",
        "An operator closed all connections, with `rabbitmqctl`.",
        wire=wire,
    ) as trial:
        trial.ends()
        await asyncio.to_thread(rabbitmq.close_all_connections, "maintenance")
        await trial.breaks()
        await trial.recovers()


async def test_a_queue_that_is_deleted_is_declared_again(run, wire, channel, name) -> None:
    """It is empty when it is deleted: what it holds would be lost, whoever consumes from it."""
    async with run(
        "queue deleted",
        "The queue was deleted in a moment when it was empty, and the consumer declared it again.",
        wire=wire,
    ) as trial:
        await trial.rests()
        trial.ends()
        await channel.queue_delete(name)
        trial.load.resume()
        await trial.breaks()
        await trial.recovers()


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
            "recovered it and its consumers; nobody was told.",
        ),
    ],
    ids=["cancelled", "recovered"],
)
async def test_a_queue_that_fails_inside_the_broker_costs_nothing(
    run, wire, rabbitmq, name, arguments, fault, then
) -> None:
    """Neither where its consumers are cancelled, nor where they are left in the dark."""
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
        await trial.recovers(anew=bool(arguments))
        await trial.flows()
    assert bool(arguments) == any("cancel" in why for _, why in trial.books.losses)


async def test_channels_closed_by_an_error_are_opened_again(run, wire, rabbitmq) -> None:
    """406, as after an ack that the broker does not know: of consuming and of publishing ones."""
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
    assert any("PRECONDITION_FAILED" in why for _, why in trial.books.losses)


async def test_credentials_that_are_refused_for_a_while_are_tried_again(
    run, wire, rabbitmq, amqp_url
) -> None:
    """With growing pauses; where a consumer has once been let in, a refusal is not fatal."""
    ctl = rabbitmq.rabbitmqctl
    await asyncio.to_thread(ctl, "add_user", wire, "old")
    await asyncio.to_thread(ctl, "set_permissions", wire, ".*", ".*", ".*")
    async with run(
        "credentials changed",
        "The user's password was changed and all connections were closed; after six refusals it"
        " was changed back.",
        url=amqp_url.replace("guest:guest", f"{wire}:old"),
        wire=wire,
    ) as trial:
        await asyncio.to_thread(ctl, "change_password", wire, "new")
        await asyncio.to_thread(rabbitmq.close_all_connections, "new password")
        await until(
            lambda: sum("ACCESS_REFUSED" in why for _, why in trial.books.losses) >= 6,
            what=lambda: trial.books.losses,
        )
        assert trial.consumer.is_running
        assert not trial.consumer.is_healthy
        await asyncio.to_thread(ctl, "change_password", wire, "old")
        trial.ends()
        await trial.recovers()
    # Two workers, and pauses of 0.5, 1, 2, 2 … s at most: a hot loop would have tried hundreds.
    assert len(trial.books.losses) < 50
