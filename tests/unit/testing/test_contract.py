"""The in-memory broker keeps the contract, and every transport that breaks a clause is detected."""

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
from aio_pika_batch.transport import Wire
from tests.unit.testing import broken
from tests.unit.testing.harness import ALL, MemoryHarness, opened

QUORUM = replace(ALL, counts_deliveries=True, exclusive_consumers=False)

MODIFYING = replace(QUORUM, retries=True)

KINDS: dict[tuple[str, str, Wire], Features] = {
    ("3.10", "classic", "auto"): ALL,
    ("4.0", "classic", "auto"): ALL,
    ("4.3", "classic", "auto"): ALL,
    # Without a delivery limit, what is given back goes to the end of the queue.
    ("3.10", "quorum", "auto"): replace(QUORUM, keeps_place=False),
    ("4.0", "quorum", "auto"): QUORUM,
    ("4.3", "quorum", "auto"): replace(QUORUM, spares_returns=True),
    # Where AMQP 1.0 isn't possible, or would lose something, AMQP 0-9-1 is used.
    ("3.10", "quorum", "amqp10"): replace(QUORUM, keeps_place=False),
    ("4.3", "classic", "amqp10"): ALL,
    ("4.0", "quorum", "amqp10"): MODIFYING,
    ("4.3", "quorum", "amqp10"): replace(MODIFYING, delays=True, spares_returns=True),
}

DIFFERENT = [
    ("3.10", "classic", "auto"),
    ("4.3", "quorum", "auto"),
    ("4.0", "quorum", "amqp10"),
    ("4.3", "quorum", "amqp10"),
]
"""What the others do in other combinations; `nox -s unit` checks those, too."""

EVERY_CLAUSE = [
    pytest.param(
        *kind,
        clause,
        id=f"{' '.join(kind)}: {clause}",
        marks=[] if kind in DIFFERENT else [pytest.mark.long, pytest.mark.untraced],
    )
    for kind, features in KINDS.items()
    for clause in TransportContract(opened, features).applicable
]


@pytest.mark.parametrize(("version", "kind", "wire", "clause"), EVERY_CLAUSE)
async def test_the_in_memory_broker_keeps_the_clause(
    version: str, kind: str, wire: Wire, clause: Clause
):
    """Each clause, for each version that it imitates, each type of queue, and each protocol."""
    features = KINDS[version, kind, wire]
    await TransportContract(partial(opened, version, kind, wire), features).check(clause)


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
"""The errors of transports that raise where the contract does not expect an error."""

WRONG = {
    # what is handed out
    broken.HandsOutTwice: "every message is delivered once",
    broken.SwapsBodies: "messages are delivered in the order of their queue",
    broken.ReordersChunks: "chunks are never empty, and their delivery tags increase",
    broken.HandsOutNothing: "chunks are never empty, and their delivery tags increase",
    broken.ForgetsItsQueue: (
        "a new message has its queue and consumer tag, and is not marked as redelivered"
    ),
    broken.LosesEmptyBodies: "a body of any size arrives unchanged, even an empty one",
    broken.MissesLaterMessages: "a message that comes later wakes a waiting receive",
    broken.DeliversOneMore: "a session has at most prefetch unsettled messages",
    broken.LimitsWithoutAPrefetch: "a prefetch of 0 means no limit",
    broken.LosesWhatIsReadWhenCancelled: "cancelling a receive loses no message",
    broken.IsAGenerator: "cancelling a receive loses no message",
    broken.NativeAgainAndAgain: "native objects are opened once",
    broken.PumpsTheFirstOfEach: (
        "pumping delivers the same messages as iterating, and ends after cancel"
    ),
    broken.PumpsForEver: "pumping delivers the same messages as iterating, and ends after cancel",
    broken.PumpsOn: "pump raises what its sink raises, and does not call the sink again",
    broken.Pumps: "a session has exactly the abilities that the features claim",
    # how it ends
    broken.NeverCancels: "after cancel, no new message is delivered",
    broken.StopsReadingAtCancel: ("messages that arrived before cancel are still received"),
    broken.LosesTheRestAtCancel: (
        "after cancel, iteration yields what was delivered before, and then ends"
    ),
    broken.CancelsOnce: "cancel may be called again, and concurrently",
    broken.CancelDoesNotEndAReceive: "cancel ends a waiting receive",
    broken.SettlesFewAfterCancel: (
        "hundreds of messages that are settled one by one after cancel do not come back"
    ),
    broken.SettlesFewInAPause: "what is settled during a pause does not come back after the close",
    broken.NeverProves: "no settlement is unproven after a regular close",
    broken.AcksOnLeaving: "unsettled messages go back to the queue when the session closes",
    broken.AcksWhatItNeverHandedOut: "prefetched messages that were never received go back, too",
    broken.SwallowsExceptions: (
        "an exception passes through the session unchanged, and unsettled messages go back"
    ),
    broken.IsSilentAfterItsEnd: "a closed session raises SessionClosed, and settles nothing",
    broken.EndsQuietlyWhenLeft: (
        "a receive that waits while the session closes raises SessionClosed"
    ),
    broken.LeavesWaitersAlone: "a receive that waits while the session closes raises SessionClosed",
    # pausing
    broken.PausesNothing: ("a paused session delivers nothing, and resumes with another prefetch"),
    broken.ResumesAsBefore: (
        "a paused session delivers nothing, and resumes with another prefetch"
    ),
    broken.CountsWhatCameBefore: (
        "what was delivered before a pause can be settled, and doesn't count for the next prefetch"
    ),
    broken.StopsReadingAtPause: "messages that arrived before a pause are still received",
    broken.ResumesTwice: (
        "pausing again changes nothing, and neither does resuming what isn't paused"
    ),
    broken.ResumesAfterItsEnd: "cancel ends a paused session, which can't be resumed then",
    broken.CancelsTheFirstConsumer: "cancel ends a resumed session",
    broken.PausesSilentlyAfterItsEnd: (
        "a closed session raises SessionClosed from pause and resume"
    ),
    broken.ResumesSilentlyAfterALoss: "a lost session raises SessionLost from pause and resume",
    # modifying
    broken.ForgetsHeaders: (
        "a modified message comes back once, with headers that replace earlier ones"
    ),
    broken.KeepsTheFirstHeaders: (
        "a modified message comes back once, with headers that replace earlier ones"
    ),
    broken.ModifiesAllAlike: "each modification of one call changes its own messages",
    broken.ForgetsDelays: (
        "a delayed message comes back when it is due, and others don't wait for it"
    ),
    broken.HoldsWhatIsDelayed: "a delayed message stays in its queue after the session",
    broken.DropsDelays: "a delay is refused if the queue can't delay messages",
    broken.TakesAbsoluteDelays: "a time in the past delays nothing",
    broken.RejectsWhatIsDead: "a dead message goes to the dead-letter exchange with its headers",
    broken.CountsAllRetries: (
        "a message that comes back with failed=False is counted only if it is claimed"
    ),
    broken.WritesAnyHeader: "a header that not everyone can read is refused, and nothing is sent",
    broken.ModifiesOneByOne: (
        "modifying a tag that is settled or unknown is refused, and nothing is sent"
    ),
    broken.ForgetsWhatIsSettledWithModifications: (
        "what is settled together with modifications is settled, all or none"
    ),
    broken.SettlesBeforeItModifies: (
        "what is settled together with modifications is settled, all or none"
    ),
    broken.ReturnsAfterCancel: "messages can be modified after cancel",
    broken.ModifiesSilentlyAfterItsEnd: "a closed session raises SessionClosed from modify",
    broken.ModifiesSilentlyAfterALoss: "a lost session raises SessionLost from modify",
    broken.ConfirmsAtOnce: (
        "what was settled before settled returned doesn't come back, even if the connection is cut"
    ),
    broken.ConfirmsOnlyOnce: (
        "what was settled before settled returned doesn't come back, even if the connection is cut"
    ),
    broken.ConfirmsAfterALoss: "a lost session raises SessionLost from settled",
    broken.ConfirmsAfterItsEnd: "a closed session raises SessionClosed from settled",
    # settling
    broken.LosesAnAck: "an acked message does not come back after the session",
    broken.AcksAllBefore: "an ack settles its own tags only, and no earlier ones",
    broken.SettlesUpToAHundred: (
        "hundreds of acks that cannot be combined are not lost when the session closes"
    ),
    broken.RejectsByRequeue: "a rejected message is removed from its queue",
    broken.RejectsByAck: "a rejected message is dead-lettered, and an acked one is not",
    broken.ReturnsByReject: "requeued and returned messages are delivered again",
    broken.ForgetsThatItWasDelivered: "a message that is delivered again is marked as redelivered",
    broken.GivesBackAtTheEnd: (
        "requeued and returned messages are delivered again before new ones"
    ),
    broken.RequeuesByReturn: "a requeued message counts its deliveries",
    broken.ReturnsByRequeue: "a returned message does not count as delivered",
    broken.SettlesAllAsTheFirst: "each message of a mixed call is settled with its own disposition",
    broken.SettlesNothingAfterCancel: "messages can be settled after cancel",
    broken.FailsOnNothing: "settling nothing is allowed",
    broken.SettlesTwiceSilently: (
        "a tag that is already settled is refused, together with the rest of the call"
    ),
    broken.SettlesHalfOfWhatItRefuses: (
        "a tag that occurs twice in one call is refused, and nothing is sent"
    ),
    broken.TakesTagZero: "a tag that was never delivered is refused, and nothing is sent",
    broken.SettlesTagsOfOtherSessions: "a tag of another session is refused",
    broken.EndsWhenItRefuses: "a session still works after it has refused a settlement",
    # losses
    broken.HidesItsLoss: "a cut connection raises SessionLost from receive, settle and cancel",
    broken.SettlesSilentlyAfterALoss: (
        "messages of a lost session are delivered again, and only the next session can settle them"
    ),
    broken.IgnoresTheEndOfItsSubscription: "a subscription that the broker ends raises SessionLost",
    broken.RefusesWhatIsTooLarge: (
        "a copy whose headers don't fit is UNPUBLISHABLE, and its neighbours are published"
    ),
    broken.KeepsAllHeaders: "a copy leaves out headers that it doesn't need, until it fits",
    broken.ForgetsWhatIsLate: (
        "a publisher that listens stays open after its time limit, and reports late outcomes"
    ),
    broken.IsAlwaysOpen: "a publisher that has lost its connection is closed, and stays closed",
    broken.ConfirmsItself: "the outcome of publications in flight on a lost connection is UNKNOWN",
    broken.RaisesItsClientsErrors: "an unreachable broker raises BrokerUnavailable",
    broken.DeclaresNothingWithoutConnecting: "an unreachable broker raises BrokerUnavailable",
    broken.OpensSessionsAnyway: "an unreachable broker raises BrokerUnavailable",
    broken.OpensPublishersAnyway: "an unreachable broker raises BrokerUnavailable",
    # publishing
    broken.PublishesTwice: "a CONFIRMED publication is in the queue, once",
    broken.LosesTheLast: "a CONFIRMED publication is in the queue, once",
    broken.PublishesBackwards: "publications arrive in order",
    broken.ReversesOutcomes: "a mandatory publication that no queue is bound for is RETURNED",
    broken.HidesRefusals: "a publication that a full queue does not take is REFUSED",
    broken.RaisesWhatIsUnknown: "a publication to a missing exchange is REFUSED",
    broken.NeedsSomething: "publishing nothing is allowed",
    broken.MixesCalls: "concurrent calls of publish get their own outcomes",
    broken.ClosesWhenCancelled: "cancelling a publish does not change later outcomes",
    broken.PublishesAfterItsEnd: "a closed publisher raises SessionClosed",
    broken.InventsAPriority: "properties arrive unchanged, and absent ones stay absent",
    broken.DropsNothing: (
        "a copy has the original's body and headers, without `drop` and with `add`"
    ),
    broken.AddsNothing: "a copy of a copy counts retries",
    broken.CopiesWithoutProperties: (
        "a copy keeps all properties, even of a message from another transport"
    ),
    broken.NeverExpires: "a copy keeps, drops or replaces its expiration",
    broken.ReturnsNoCopy: "a copy that no queue is bound for is RETURNED",
    broken.CopiesAnyUserId: "a copy does not carry another user's user_id",
    # declaring
    broken.DeclaresSomethingOnly: "declaring nothing is allowed",
    broken.DeclaresNothing: "a declared queue exists, and declaring it again changes nothing",
    broken.CreatesWhatItChecks: "check_only creates nothing, and accepts an existing queue",
    broken.ComparesAlways: "existing_first accepts an existing queue as it is",
    broken.ComparesNever: "declaring an existing queue with other arguments raises TopologyError",
    broken.CreatesWhatItConsumes: "consuming from a missing queue raises TopologyError",
    broken.NeverAlone: "an exclusive consumer's queue refuses a second session",
    broken.KeepsOwnQueues: "an exclusive queue is deleted when its session closes",
    broken.CountsOneMore: (
        "count counts ready messages, and raises TopologyError for a missing queue"
    ),
    broken.ForgetsItsBroker: "the broker's version is known after a declaration",
    broken.IgnoresWishes: "a new queue gets the arguments of its wishes",
    broken.ReportsNothing: "an existing queue is accepted without wishes, and they are reported",
    broken.AcceptsAnyQueueWithWishes: (
        "wishes do not hide that an existing queue has other arguments"
    ),
    broken.BelievesWhatItIsTold: "exchange_type finds the type of an exchange, and creates none",
    broken.PublishesToCheck: "what can be published to is checked without storing anything",
}


def contract_of(around: type, **claims: bool) -> TransportContract:
    """Return the contract for a transport around the in-memory one, with all features claimed."""
    session_class = getattr(around, "session_class", object)
    is_modifying = issubclass(session_class, broken.HonestModifyingSession)
    wire: Wire = "amqp10" if is_modifying else "auto"
    return TransportContract(
        partial(opened, "4.3", "quorum", wire, around=around),
        replace(KINDS["4.3", "quorum", wire], **claims),
        patience=1.0,
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"), WRONG.items(), ids=[wrong.__name__ for wrong in WRONG]
)
async def test_a_transport_that_breaks_a_clause_is_detected(wrong: type, sentence: str):
    """By that clause, which says what it has found."""
    claims = {
        "exclusive_consumers": True,
        "pumps": wrong is not broken.Pumps and issubclass(wrong, broken.Pumps),
    }
    if wrong is broken.DropsDelays:
        claims["delays"] = False
    contract = contract_of(broken.as_transport(wrong), **claims)
    [clause] = [each for each in contract.applicable if str(each) == sentence]
    with pytest.raises(RAISED.get(wrong, ClauseBroken)):
        await contract.check(clause)


def test_every_clause_can_be_broken():
    """A clause that no transport can break would prove nothing."""
    assert {str(clause) for clause in CLAUSES} == set(WRONG.values())
    assert len(CLAUSES) == len({str(clause) for clause in CLAUSES})


def test_every_need_is_a_feature():
    """Otherwise a clause would never apply, or fail because of a missing field."""
    fields = set(Features.__dataclass_fields__)
    assert fields >= {need for clause in CLAUSES for need in clause.needs}
    assert Features().__dataclass_fields__.keys() >= set(Features.__slots__)


async def test_a_transport_that_passes_everything_on_keeps_the_contract():
    """So each broken transport is wrong in one thing only."""
    report = await contract_of(broken.Honest).run(at_once=100)
    report.raise_if_broken()
    pumping = contract_of(broken.as_transport(broken.Pumps), pumps=True)
    (await pumping.run(at_once=100)).raise_if_broken()
    modifying = contract_of(broken.as_transport(broken.HonestModifyingSession))
    (await modifying.run(at_once=100)).raise_if_broken()


async def test_a_claimed_feature_must_exist():
    """And one that is not claimed must not exist if a consumer would use it."""
    offers = (
        "pumps",
        "adjusts",
        "proves",
        "confirms_settlements",
        "has_native",
        "tells_version",
        "counts_ready",
        "inspects",
    )
    nothing = dict.fromkeys((*offers, "dead_letters"), False)
    (await contract_of(broken.Bare, **nothing).run(at_once=100)).raise_if_broken()
    report = await contract_of(broken.Bare, **dict.fromkeys(offers, True)).run(at_once=100)
    without_pause = dict.fromkeys(
        [str(clause) for clause in CLAUSES if "adjusts" in clause.needs],
        "the session has no methods pause and resume",
    )
    without_settled = dict.fromkeys(
        [str(clause) for clause in CLAUSES if "confirms_settlements" in clause.needs],
        "the session has no method settled",
    )
    missing = without_pause | without_settled
    assert {str(finding.clause): finding.why for finding in report.broken} == missing | {
        "a session has exactly the abilities that the features claim": (
            "whether it can pump: expected True, found False"
        ),
        "pumping delivers the same messages as iterating, and ends after cancel": (
            "the session has no method pump"
        ),
        "pump raises what its sink raises, and does not call the sink again": (
            "the session has no method pump"
        ),
        "no settlement is unproven after a regular close": (
            "settlements that are unproven: expected 0, found None"
        ),
        "native objects are opened once": "the session has no method native",
        "the broker's version is known after a declaration": (
            "the transport has no broker_version"
        ),
        "count counts ready messages, and raises TopologyError for a missing queue": (
            "the transport has no method count"
        ),
        "exchange_type finds the type of an exchange, and creates none": (
            "the transport has no method exchange_type"
        ),
    }


async def test_a_report_lists_every_clause():
    """With a reason if there is one."""
    report = await contract_of(broken.as_transport(broken.PublishesTwice)).run(at_once=100)
    assert tuple(finding.clause for finding in report.findings) == CLAUSES
    assert len(CLAUSES) == sum(map(len, (report.kept, report.broken, report.not_applicable)))
    lines = str(report).splitlines()
    assert "kept: every message is delivered once" in lines
    assert (
        "broken: a CONFIRMED publication is in the queue, once"
        " (messages that wait in 'q': expected 100, found 101)"
    ) in lines
    assert (
        "not applicable: an exclusive consumer's queue refuses a second session"
        " (needs exclusive_consumers)"
    ) in lines
    with pytest.raises(ClauseBroken, match=r"clauses are broken:\n  broken: a publisher"):
        report.raise_if_broken()


async def test_a_check_that_hangs_breaks_its_clause(virtual_loop):
    """After ten times the patience."""
    contract = contract_of(broken.as_transport(broken.NeverConfirms))
    clause = next(each for each in CLAUSES if str(each) == "publishing nothing is allowed")
    with pytest.raises(ClauseBroken, match="did not finish within 10 s"):
        await contract.check(clause)
    assert 10 == virtual_loop.time()


async def test_no_feature_is_claimed_by_default():
    """Only the clauses that every transport must keep apply."""
    contract = TransportContract(opened)
    assert contract.applicable == [clause for clause in CLAUSES if not clause.needs]
    assert 20 < len(contract.applicable) < len(CLAUSES)


@pytest.mark.parametrize("ability", ["cut", "hush", "end_subscriptions", "lock_out"])
async def test_a_harness_without_a_claimed_ability_raises(ability: str):
    """The error names the method."""

    class Bare(MemoryHarness):
        pass

    setattr(Bare, ability, getattr(Harness, ability))
    with pytest.raises(NotImplementedError, match=f"can_{ability} promises Harness.{ability}"):
        await getattr(Bare(Broker(), MemoryTransport()), ability)()
