"""Mutants of the inbox, the outbox and its relay."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_INBOX = "tests/unit/inbox"

EXACTLY_ONCE = (
    Mutant(
        "A message that took effect before takes effect again.",
        "inbox.py",
        "            elif key in present:\n",
        "            elif False:\n",
        (f"{_INBOX}/test_consumers.py", f"{_INBOX}/test_laws.py"),
    ),
    Mutant(
        "Two messages with one id in a batch both take effect.",
        "inbox.py",
        "if key and (first := ids[key]) is not message:",
        "if key and (first := message) is not message:",
        (f"{_INBOX}/test_inbox.py",),
    ),
    Mutant(
        "A message that isn't ACKed leaves its claim behind, and is dropped when it comes again.",
        "inbox.py",
        "if id(message) in not_acked]",
        "if False]",
        (f"{_INBOX}/test_laws.py",),
    ),
    Mutant(
        "A repeated message is ACKed although the first one with its id was rejected.",
        "inbox.py",
        "            if id(first) in not_acked:\n",
        "            if False:\n",
        (f"{_INBOX}/test_inbox.py",),
    ),
    Mutant(
        "A commit that the database refused is taken for one with an unknown outcome.",
        "inbox.py",
        "            if not is_refusal(error):\n",
        "            if True:\n",
        (f"{_INBOX}/test_consumers.py",),
    ),
    Mutant(
        "After a commit with an unknown outcome the batch gets the result of a failure.",
        "inbox.py",
        "            if not is_refusal(error):\n",
        "            if False:\n",
        (f"{_INBOX}/test_consumers.py",),
    ),
    Mutant(
        "A bare claim is accepted with settle='batch', so that a failed commit loses the effect.",
        "inbox.py",
        "if context is not None and not context.is_atomic:",
        "if False:",
        (f"{_INBOX}/test_consumers.py",),
    ),
    Mutant(
        "A claim is accepted outside a transaction.",
        "inbox.py",
        "    if not await database.can_roll_back():\n",
        "    if False:\n",
        (f"{_INBOX}/test_inbox.py", f"{_INBOX}/test_consumers.py"),
    ),
    Mutant(
        "A deadlock between claims fails the batch at once.",
        "inbox.py",
        "if not is_deadlock(error) or attempt == ATTEMPTS - 1:",
        "if True:",
        (f"{_INBOX}/test_inbox.py",),
    ),
    Mutant(
        "An id that a database would cut is claimed, and equals another one.",
        "inbox.py",
        'if len(key) > LONGEST or "\\0" in key:',
        "if False:",
        (f"{_INBOX}/test_inbox.py",),
    ),
    Mutant(
        "Claims are taken in the order of the batch: two batches deadlock.",
        "databases/inbox_table.py",
        '{each} AS ids(id) ORDER BY id COLLATE "C"\nON',
        "{each} AS ids(id)\nON",
        ("tests/integration/test_inbox_claims.py",),
    ),
    Mutant(
        "A connection that changes ids is accepted: messages are dropped.",
        "databases/inbox_table.py",
        "        if found and not found.issubset(ids):\n",
        "        if False:\n",
        (f"{_INBOX}/test_inbox.py",),
    ),
    Mutant(
        "A row is deleted although its publication isn't confirmed.",
        "outbox/relay.py",
        "requeue if row.delivery_tag in unconfirmed else ack",
        "ack",
        (f"{_INBOX}/test_outbox.py",),
    ),
    Mutant(
        "A lost connection counts as an attempt of every row.",
        "outbox/relay.py",
        "in answers if outcome in _FAILED]",
        "in answers]",
        (f"{_INBOX}/test_outbox.py",),
    ),
    Mutant(
        "Rows with one key are published at the same time, and can overtake each other.",
        "outbox/relay.py",
        "        at = seen.get(row.key, -1) + 1\n",
        "        at = 0\n",
        (f"{_INBOX}/test_outbox.py",),
    ),
    Mutant(
        "A row that can't be encoded is published again without a pause.",
        "outbox/relay.py",
        "_FAILED = (Outcome.RETURNED, Outcome.REFUSED, Outcome.UNPUBLISHABLE)",
        "_FAILED = (Outcome.RETURNED, Outcome.REFUSED)",
        (f"{_INBOX}/test_outbox.py",),
    ),
    Mutant(
        "A header whose only name begins with a dollar sign comes back as another value.",
        "outbox/outbox.py",
        'is_like_type = len(value) == 1 and str(*value).startswith("$")',
        "is_like_type = False",
        (f"{_INBOX}/test_outbox.py",),
    ),
    Mutant(
        "A publication gets another id each time it is published.",
        "core/publication.py",
        "headers=headers, message_id=self.message_id)",
        "headers=headers, message_id=str(id(self)))",
        (f"{_INBOX}/test_outbox.py",),
    ),
    Mutant(
        "Results that come together are accepted although there are too many.",
        "core/batch_run.py",
        "is_whole = 1 < len(items) == self._missing and not self._pairs",
        "is_whole = 1 < len(items)",
        ("tests/unit/core/test_results.py",),
    ),
    Mutant(
        "An invalid row is published without its properties.",
        "outbox/relay.py",
        "        self._invalid.add(tag)\n",
        "        pass\n",
        (f"{_INBOX}/test_outbox.py",),
    ),
)
