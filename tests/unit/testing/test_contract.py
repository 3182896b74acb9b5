"""The broker in memory keeps the contract, and whoever breaks it is found out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from aio_pika_batch.adapters.memory import Broker, MemoryTransport
from aio_pika_batch.errors import SessionLost, TopologyError
from aio_pika_batch.testing.contract import (
    CLAUSES,
    Clause,
    ClauseBroken,
    Features,
    Harness,
    TransportContract,
)
from tests.unit.testing import broken
from tests.unit.testing.harness import ALL, MemoryHarness, opened

QUORUM = replace(ALL, counts_deliveries=True, exclusive_consumers=False)

KINDS = {
    ("3.10", "classic"): ALL,
    ("4.0", "classic"): ALL,
    ("4.3", "classic"): ALL,
    # Without a delivery limit, what is given back goes to the end of the queue.
    ("3.10", "quorum"): replace(QUORUM, keeps_place=False),
    ("4.0", "quorum"): QUORUM,
    ("4.3", "quorum"): replace(QUORUM, spares_returns=True),
}

EVERY_CLAUSE = [
    pytest.param(version, kind, clause, id=f"{version} {kind}: {clause}")
    for (version, kind), features in KINDS.items()
    for clause in TransportContract(opened, features).applicable
]


@pytest.mark.parametrize(("version", "kind", "clause"), EVERY_CLAUSE)
async def test_the_broker_in_memory_keeps(version: str, kind: str, clause: Clause):
    """Each clause, as each release that it imitates, with each kind of queue."""
    features = KINDS[version, kind]
    await TransportContract(partial(opened, version, kind), features).check(clause)


RAISED = {
    broken.CancelsOnce: RuntimeError,
    broken.ComparesAlways: TopologyError,
    broken.DeclaresSomethingOnly: ValueError,
    broken.EndsWhenItRefuses: SessionLost,
    broken.FailsOnNothing: ValueError,
    broken.NeedsSomething: ValueError,
    broken.PumpsForEver: TimeoutError,
    broken.RaisesWhatIsUnknown: ConnectionError,
}
"""What is raised where nothing is to be raised, and nobody has put it into words."""

WRONG = {
    # what is handed out
    broken.HandsOutTwice: "every message is handed out once",
    broken.SwapsBodies: "messages are handed out in the order of their queue",
    broken.ReordersChunks: "chunks hold messages, in the rising order of their tags",
    broken.HandsOutNothing: "chunks hold messages, in the rising order of their tags",
    broken.ForgetsWhereFrom: "a message says where it was found, and that it is new",
    broken.LosesEmptyBodies: "a body of any size arrives as it was, also an empty one",
    broken.NoticesNothingLater: "what comes later wakes who waits",
    broken.OneMore: "prefetch is what is handed out at most",
    broken.CountsNoFurther: "a prefetch of 0 is no limit",
    broken.LosesWhatIsReadWhenCancelled: "a receive that is cancelled loses nothing",
    broken.IsAGenerator: "a receive that is cancelled loses nothing",
    broken.NativeAgainAndAgain: "native objects are opened once",
    broken.PumpsTheFirstOfEach: "pumping hands over what iterating would, and ends after cancel",
    broken.PumpsForEver: "pumping hands over what iterating would, and ends after cancel",
    broken.PumpsOn: "what a sink raises is raised where it pumps, and the sink is left alone",
    broken.Pumps: "what a session offers beside is what is claimed",
    # how it ends
    broken.NeverCancels: "after cancel nothing new is delivered",
    broken.StopsReadingAtCancel: (
        "what has arrived and was not handed out when cancel is called still is"
    ),
    broken.LosesTheRestAtCancel: (
        "after cancel what was delivered before is handed out, and then iteration ends"
    ),
    broken.CancelsOnce: "cancel may be called again, and by several at once",
    broken.CancelWakesNobody: "cancel ends the wait of who receives",
    broken.AcksOnLeaving: "what is unsettled on leaving goes back to the queue",
    broken.AcksWhatItNeverHandedOut: "what was never handed out goes back, too",
    broken.SwallowsExceptions: (
        "an exception leaves the context as it is, and what is unsettled goes back"
    ),
    broken.IsSilentAfterItsEnd: "a session that was left raises SessionClosed, and settles nothing",
    broken.EndsQuietlyWhenLeft: "whoever waits for messages when a session is left is told",
    broken.LeavesWaitersAlone: "whoever waits for messages when a session is left is told",
    # settling
    broken.LosesAnAck: "an acked message stays gone after the session",
    broken.AcksAllBefore: "an ack settles its own tags, and none before them",
    broken.SettlesUpToAHundred: "hundreds of acks that cannot be joined are not lost at the end",
    broken.RejectsByRequeue: "a rejected message leaves its queue",
    broken.RejectsByAck: "a rejected message is dead-lettered, and an acked one is not",
    broken.ReturnsByReject: "what is requeued or returned is handed out again",
    broken.ForgetsThatItWasDelivered: "what is handed out again says so",
    broken.GivesBackAtTheEnd: (
        "what is given back keeps its place before what was never handed out"
    ),
    broken.RequeuesByReturn: "what is requeued counts its deliveries",
    broken.ReturnsByRequeue: "what is returned does not count as delivered",
    broken.SettlesAllAsTheFirst: "each message is settled as it was said, whatever its neighbours",
    broken.SettlesNothingAfterCancel: "settling goes on after cancel",
    broken.FailsOnNothing: "to settle nothing is allowed",
    broken.SettlesTwiceSilently: (
        "a tag that is settled already is refused, with all that stands beside it"
    ),
    broken.SettlesHalfOfWhatItRefuses: (
        "a tag that stands twice in one call is refused, and nothing is sent"
    ),
    broken.TakesTagZero: "a tag that was never delivered is refused, and nothing is sent",
    broken.AsksNobodyWhoseTagItIs: "a tag of another session is refused",
    broken.EndsWhenItRefuses: "a session goes on after it has refused a settlement",
    # losses
    broken.HidesItsLoss: "a cut connection raises SessionLost: in receive, in settle and in cancel",
    broken.SettlesIntoTheVoid: (
        "what a lost session had comes again, and only the next one can settle it"
    ),
    broken.NeverHearsOfItsEnd: "the end of a subscription is a loss, too",
    broken.IsAlwaysOpen: "a publisher that was lost is not open, and stays so",
    broken.ConfirmsItself: "publications in flight on a lost connection are UNKNOWN",
    broken.SpeaksAsItsClient: "a broker that is not there is told by BrokerUnavailable",
    broken.MeetsNobodyForNothing: "a broker that is not there is told by BrokerUnavailable",
    broken.OpensSessionsAnyway: "a broker that is not there is told by BrokerUnavailable",
    broken.OpensPublishersAnyway: "a broker that is not there is told by BrokerUnavailable",
    # publishing
    broken.PublishesTwice: "what is CONFIRMED is in the queue, each once",
    broken.LosesTheLast: "what is CONFIRMED is in the queue, each once",
    broken.PublishesBackwards: "publications arrive in their order",
    broken.TurnsOutcomesRound: "a mandatory publication that no queue takes is RETURNED",
    broken.HidesRefusals: "what a full queue does not take is REFUSED",
    broken.RaisesWhatIsUnknown: "what goes to an exchange that is not there is REFUSED",
    broken.NeedsSomething: "to publish nothing is allowed",
    broken.MixesCalls: "calls at the same time get the outcomes of their own",
    broken.ClosesWhenCancelled: "a publish that is cancelled confuses nobody",
    broken.PublishesAfterItsEnd: "a publisher that was left raises SessionClosed",
    broken.InventsAPriority: "properties arrive as they were, and what is absent stays absent",
    broken.DropsNothing: (
        "a copy has its original's body and properties, without `drop` and with `add`"
    ),
    broken.AddsNothing: "a copy of a copy counts retries",
    broken.CopiesWithoutProperties: "a copy keeps all properties, also of a message from elsewhere",
    broken.NeverExpires: "a copy keeps its expiration, leaves it out, or has another",
    broken.ReturnsNoCopy: "a copy that no queue takes is RETURNED",
    broken.TakesOnAnyName: "a copy does not carry another user's name",
    # declaring
    broken.DeclaresSomethingOnly: "to declare nothing is allowed",
    broken.DeclaresNothing: "a declared queue is there, and to declare it again changes nothing",
    broken.CreatesWhatItChecks: "check_only creates nothing, and is content with what is there",
    broken.ComparesAlways: "what exists is taken as it is, where that is asked for",
    broken.ComparesNever: "what exists otherwise than declared is a TopologyError",
    broken.CreatesWhatItConsumes: "a queue that is not there cannot be consumed: TopologyError",
    broken.NeverAlone: "a queue that is consumed alone has no second session",
    broken.KeepsOwnQueues: "a queue of a session's own lives and dies with it",
    broken.CountsOneMore: "what is ready in a queue is counted, where there is such a queue",
    broken.ForgetsItsBroker: "the broker's version is known once something was declared",
}


def contract_of(around: type, **claims: bool) -> TransportContract:
    """The contract for a transport around the one in memory, with everything that can be had."""
    return TransportContract(
        partial(opened, "4.3", "quorum", around=around),
        replace(KINDS["4.3", "quorum"], **claims),
        patience=1.0,
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"), WRONG.items(), ids=[wrong.__name__ for wrong in WRONG]
)
async def test_who_breaks_a_clause_is_found_out(wrong: type, sentence: str):
    """By that clause, and it says what it has found."""
    claims = {
        "exclusive_consumers": True,
        "pumps": wrong is not broken.Pumps and issubclass(wrong, broken.Pumps),
    }
    contract = contract_of(broken.as_transport(wrong), **claims)
    [clause] = [each for each in contract.applicable if str(each) == sentence]
    with pytest.raises(RAISED.get(wrong, ClauseBroken)):
        await contract.check(clause)


def test_every_clause_can_be_broken():
    """One that nobody can break says nothing."""
    assert {str(clause) for clause in CLAUSES} == set(WRONG.values())
    assert len(CLAUSES) == len({str(clause) for clause in CLAUSES})


def test_every_need_is_a_feature():
    """Else a clause would never apply, or fail for want of a field."""
    fields = set(Features.__dataclass_fields__)
    assert fields >= {need for clause in CLAUSES for need in clause.needs}
    assert Features().__dataclass_fields__.keys() >= set(Features.__slots__)


async def test_who_hands_everything_on_keeps_it():
    """The wrong ones are wrong in one thing: what they are made of is right."""
    report = await contract_of(broken.Honest).run(at_once=100)
    report.raise_if_broken()
    pumping = contract_of(broken.as_transport(broken.Pumps), pumps=True)
    (await pumping.run(at_once=100)).raise_if_broken()


async def test_what_is_claimed_must_be_there():
    """And what is not claimed must not, where a consumer would use it unasked."""
    offers = ("pumps", "has_native", "tells_version", "counts_ready")
    nothing = dict.fromkeys((*offers, "dead_letters"), False)
    (await contract_of(broken.Bare, **nothing).run(at_once=100)).raise_if_broken()
    report = await contract_of(broken.Bare, **dict.fromkeys(offers, True)).run(at_once=100)
    assert {str(finding.clause): finding.why for finding in report.broken} == {
        "what a session offers beside is what is claimed": (
            "whether it can pump: expected True, found False"
        ),
        "pumping hands over what iterating would, and ends after cancel": (
            "the session has no method pump"
        ),
        "what a sink raises is raised where it pumps, and the sink is left alone": (
            "the session has no method pump"
        ),
        "native objects are opened once": "the session has no method native",
        "the broker's version is known once something was declared": (
            "the transport has no broker_version"
        ),
        "what is ready in a queue is counted, where there is such a queue": (
            "the transport has no method count"
        ),
    }


async def test_a_report_tells_what_was_found():
    """Every clause, with the reason where there is one."""
    report = await contract_of(broken.as_transport(broken.PublishesTwice)).run(at_once=100)
    assert tuple(finding.clause for finding in report.findings) == CLAUSES
    assert len(CLAUSES) == sum(map(len, (report.kept, report.broken, report.not_applicable)))
    lines = str(report).splitlines()
    assert "kept: every message is handed out once" in lines
    assert (
        "broken: what is CONFIRMED is in the queue, each once"
        " (messages that wait in 'q': expected 100, found 101)"
    ) in lines
    assert (
        "not applicable: a queue that is consumed alone has no second session"
        " (needs exclusive_consumers)"
    ) in lines
    with pytest.raises(ClauseBroken, match=r"clauses are broken:\n  broken: a publisher"):
        report.raise_if_broken()


async def test_what_hangs_is_broken(virtual_loop):
    """After ten times the patience; and nothing hangs for ever."""
    contract = contract_of(broken.as_transport(broken.NeverConfirms))
    clause = next(each for each in CLAUSES if str(each) == "to publish nothing is allowed")
    with pytest.raises(ClauseBroken, match="not done within 10 s"):
        await contract.check(clause)
    assert 10 == virtual_loop.time()


async def test_nothing_is_claimed_unless_it_is_said():
    """What is left is what every transport owes."""
    contract = TransportContract(opened)
    assert contract.applicable == [clause for clause in CLAUSES if not clause.needs]
    assert 20 < len(contract.applicable) < len(CLAUSES)


@pytest.mark.parametrize("ability", ["cut", "hush", "end_subscriptions", "lock_out"])
async def test_a_harness_says_what_it_was_to_do(ability: str):
    """If it is claimed, and not there."""

    class Bare(MemoryHarness):
        pass

    setattr(Bare, ability, getattr(Harness, ability))
    with pytest.raises(NotImplementedError, match=f"can_{ability} promises Harness.{ability}"):
        await getattr(Bare(Broker(), MemoryTransport()), ability)()
