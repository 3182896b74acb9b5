"""Mutants of the sessions over AMQP 1.0, and of the choice between the protocols."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_PACKAGE = "adapters/amqp10"
_TESTS = "tests/unit/adapters/amqp10"
_CHOICE = "tests/unit/adapters/test_rabbitmq.py"

AMQP10 = (
    Mutant(
        "The deliveries of 4.0 are counted from 0: it sends 5 messages more than the prefetch.",
        f"{_PACKAGE}/receiver.py",
        "attach.initial_delivery_count or 0",
        "UInt(0)",
        (f"{_TESTS}/test_receiver_machine.py",),
    ),
    Mutant(
        "A flow that is sent before the broker's begin names its first id, which 4.0 refuses.",
        f"{_PACKAGE}/management.py",
        "Flow(None, _WINDOW",
        "Flow(UInt(0), _WINDOW",
        (_CHOICE,),
    ),
    Mutant(
        "Credit of a flow on another link is taken for the answer to a question.",
        f"{_PACKAGE}/receiver.py",
        "if not (flow.drain and self._is_asking):",
        "if not self._is_asking:",
        (f"{_TESTS}/test_receiver_machine.py",),
    ),
    Mutant(
        "After a resume, messages from before the pause use up the new prefetch.",
        f"{_PACKAGE}/receiver.py",
        "self._prefetch - self.unsettled.counted",
        "self._prefetch - len(self.unsettled)",
        (f"{_TESTS}/test_session.py",),
    ),
    Mutant(
        "Messages from before a pause, settled after the resume, give more credit than allowed.",
        f"{_PACKAGE}/settling.py",
        "                self._exempt.difference_update(tags)\n",
        "",
        (f"{_TESTS}/test_session.py",),
    ),
    Mutant(
        "A stop believes the first answer, which overtakes what the broker has kept back.",
        f"{_PACKAGE}/session.py",
        "_PROOFS: Final = 2",
        "_PROOFS: Final = 1",
        (f"{_TESTS}/test_session.py",),
    ),
    Mutant(
        "A delay is sent to a broker that ignores it, so that all attempts follow at once.",
        f"{_PACKAGE}/session.py",
        "if not self.retries.delays and any(",
        "if False and any(",
        (f"{_TESTS}/test_session.py",),
    ),
    Mutant(
        "All headers of a dead letter are written again for each one of a batch.",
        f"{_PACKAGE}/settling.py",
        "(kinds[outcome], len(outcome))",
        "kinds[outcome] / len(outcome)",
        (f"{_TESTS}/test_settling.py",),
    ),
    Mutant(
        "Headers that no later consumer can read are written into a message.",
        f"{_PACKAGE}/settling.py",
        "    check_modified_headers(modification.headers)\n",
        "",
        (f"{_TESTS}/test_settling.py",),
    ),
    Mutant(
        "After a failure of its session over a message, the broker gets the same session again.",
        "adapters/rabbitmq.py",
        "            if opened.crashed_on is not None:\n",
        "            if False:\n",
        (_CHOICE,),
    ),
    Mutant(
        "A session that an operator closes is taken for one that failed over a message.",
        f"{_PACKAGE}/session.py",
        'return "forced" not in str(error).lower()',
        "return True",
        (_CHOICE,),
    ),
    Mutant(
        "A consumer never returns to AMQP 1.0 after a failure.",
        "adapters/rabbitmq.py",
        "loop.call_later(remaining, session.expire) if remaining else None",
        "None",
        (_CHOICE,),
    ),
    Mutant(
        "A session that expires is given up like a lost one: its messages are handled twice.",
        "runtime/consume_loop.py",
        "isinstance(session, ExpiringSession) and session.is_expired",
        "False",
        ("tests/unit/shell/test_reconnecting.py",),
    ),
    Mutant(
        "Before 4.3, our own retries use up the delivery limit.",
        "core/topology.py",
        "version < DELAYS_SINCE and not is_unlimited",
        "False",
        (_CHOICE,),
    ),
    Mutant(
        "The queue dead-letters at most once, and so loses messages.",
        "core/topology.py",
        "DEAD_LETTER_EXCHANGE in arguments and",
        "DEAD_LETTER_EXCHANGE in arguments or",
        (_CHOICE,),
    ),
    Mutant(
        "A client without a certificate retries forever if it doesn't receive the broker's alert.",
        "adapters/connecting.py",
        "            errors.append(await _lost_alert(endpoint, address, error) or error)\n",
        "            errors.append(error)\n",
        ("tests/unit/adapters/test_tls.py",),
    ),
    Mutant(
        "A host that is down hides that another one refuses the login.",
        "adapters/connecting.py",
        "    kind = AccessRefused if refusals else BrokerUnavailable\n",
        "    kind = BrokerUnavailable\n",
        (f"{_TESTS}/test_connection.py",),
    ),
)
