"""Mutants of retries and dead letters that need no copies, whatever the transport."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CORE = ("tests/unit/core/test_native_retries.py",)
_SHELL = ("tests/unit/shell/test_native_retries.py",)
_CONTRACT = ("tests/unit/testing/test_contract.py",)
_PROCESS = ("tests/unit/testing/test_process.py",)
_PLAN = "core/settlement_plan.py"

NATIVE = (
    Mutant(
        "`check` doesn't notice a broker whose clock is behind.",
        "cli/check.py",
        "    return max(0.0, earliest) + min(0.0, latest)\n",
        "    return max(0.0, earliest)\n",
        ("tests/unit/cli/test_commands.py",),
    ),
    Mutant(
        "Suspects stay suspects when they are retried, and take away the delays of all retries.",
        _PLAN,
        "if self.native.headers and self.may_return(message):",
        "if self.native.headers:",
        _SHELL,
    ),
    Mutant(
        "Own retries count as failed deliveries, and use up the delivery limit.",
        _PLAN,
        "failed=False, until=until",
        "failed=True, until=until",
        (*_CORE, *_SHELL),
    ),
    Mutant(
        "A retry without a delay comes back at once: all attempts are spent in milliseconds.",
        _PLAN,
        "or SHORTEST_NATIVE",
        "or 0.0",
        _CORE,
    ),
    Mutant(
        "A delay that a handler asks for isn't limited by requeue_delay_max.",
        _PLAN,
        "min(seconds, self.delay_steps.longest)",
        "max(seconds, 0.0)",
        _CORE,
    ),
    Mutant(
        "A consumer that holds a message forgets how much of its delay is left.",
        _PLAN,
        "remaining = math.ceil((seconds - hold) * 1000)",
        "remaining = 0",
        _CORE,
    ),
    Mutant(
        "Before 4.3 own retries look like crashes.",
        _PLAN,
        "        if not native.uncounted:\n",
        "        if native.uncounted:\n",
        (*_CORE, *_SHELL),
    ),
    Mutant(
        "Suspects are copied although returning them costs nothing: a crash can duplicate them.",
        _PLAN,
        "if self.crashes is None or self.native.uncounted:",
        "if self.crashes is None:",
        (*_CORE, *_SHELL),
    ),
    Mutant(
        "Anyone can publish a message that is never suspected of crashing its process.",
        "core/quarantine.py",
        "min(returned, message.retry_count, deliveries)",
        "min(returned, deliveries)",
        _CORE,
    ),
    Mutant(
        "Headers of an earlier death seem to belong to this one.",
        _PLAN,
        '**dict.fromkeys(REWRITTEN, ""),',
        "",
        _CORE,
    ),
    Mutant(
        "Dead letters go wherever the queue's own arguments lead.",
        _PLAN,
        "if self.native.dead_letters and not self.dead_letters_differ:",
        "if self.native.dead_letters:",
        _CORE,
    ),
    Mutant(
        "A queue that may lose dead letters gets them without a copy.",
        _PLAN,
        "if self.native.dead_letters and not self.dead_letters_differ:",
        "if self.native.headers and not self.dead_letters_differ:",
        _CORE,
    ),
    Mutant(
        "The broker's own entry in x-death hides why a message was dead-lettered.",
        "core/retry.py",
        "return limit is not None and count <= limit",
        "return False",
        (*_CORE, *_SHELL),
    ),
    Mutant(
        "A later death in the same queue is taken for the one that was stated.",
        "core/retry.py",
        "return limit is not None and count <= limit",
        "return True",
        _CORE,
    ),
    Mutant(
        "Modifications that only look alike are joined: a message gets another one's headers.",
        "core/settlement.py",
        "key = (each.failed, each.until, each.dead, tuple(each.headers.items()))",
        "key = (each.failed, each.until, each.dead, len(each.headers))",
        ("tests/unit/core/test_modification.py", *_CONTRACT),
    ),
    Mutant(
        "A message whose count is not a number shares the plan of one with a count.",
        _PLAN,
        "(name, type(headers[name]), headers[name])",
        "(name, headers[name])",
        _CORE,
    ),
    Mutant(
        "A message dies as often as its neighbour did.",
        _PLAN,
        "(DEATHS, DEATH_COUNT, DEATH_REASON,",
        "(DEATHS, DEATH_REASON,",
        _CORE,
    ),
    Mutant(
        "A message that failed in place gets the first failure of its neighbour.",
        _PLAN,
        "id(outcome.error), message.first_failed_at, values)",
        "id(outcome.error), values)",
        _CORE,
    ),
    Mutant(
        "A dead letter gets the exception of its neighbour.",
        _PLAN,
        "id(outcome.error), message.first_failed_at, values)",
        "message.first_failed_at, values)",
        _CORE,
    ),
    Mutant(
        "A float is attached to a message, which no AMQP 1.0 consumer can be sent any more.",
        "core/settlement.py",
        "if not name.startswith",
        "if False and not name.startswith",
        ("tests/unit/core/test_modification.py", *_CONTRACT),
    ),
    Mutant(
        "What is held at a stop goes back without being counted.",
        "runtime/settler.py",
        "if native and Outcome.CONFIRMED in await self._publish_again(native):",
        "if False:",
        _SHELL,
    ),
    Mutant(
        "A message that was modified is acknowledged, too.",
        "runtime/settler.py",
        "[each.tag for each in copies if not each.is_native]",
        "[each.tag for each in copies]",
        _SHELL,
    ),
    Mutant(
        "What succeeded beside a retry is never acknowledged.",
        "runtime/settler.py",
        "settlements if is_joined else ()",
        "()",
        _SHELL,
    ),
    Mutant(
        "A message that was requeued at once becomes a suspect by a retry.",
        "runtime/settler.py",
        "self._own.note_retry(each.outcome.message, modification.headers)",
        "pass",
        _SHELL,
    ),
    Mutant(
        "A message that was requeued at once is forgotten by its retry.",
        "core/quarantine.py",
        "self._record(_fingerprint(message, changed), counts)",
        "self._record(_fingerprint(message), counts)",
        _SHELL,
    ),
    Mutant(
        "A session ends without waiting for its last settlements.",
        "runtime/consume_loop.py",
        "                await self._is_done_in_time(self._session.settled())\n",
        "                pass\n",
        ("tests/unit/shell/test_drain.py",),
    ),
    Mutant(
        "Dead letters are read over AMQP 1.0: their copies lack what it doesn't show.",
        "queue_browser.py",
        "        for_copies=True,\n",
        "",
        ("tests/unit/shell/test_dead_letter_tools.py",),
    ),
    Mutant(
        "The broker in memory forgets delayed messages when their consumer leaves.",
        "adapters/memory/queue.py",
        "        self._release_delayed()\n",
        "",
        (*_CONTRACT, *_SHELL),
    ),
    Mutant(
        "process() shows copies where a worker makes none.",
        "testing/processing.py",
        "planner = self._config.planner.natively(self._native)",
        "planner = self._config.planner",
        _PROCESS,
    ),
    Mutant(
        "process() shows native retries where a worker makes copies.",
        "testing/processing.py",
        'if wire != "amqp10" or version is None or obstacle is not None:',
        'if wire != "amqp10" or version is None:',
        _PROCESS,
    ),
)
