"""Lists what is measured, and with how many messages.

Slow clients get fewer, so that a round takes minutes. Each round measures all cases of a section in
turn, so that whatever else the machine does affects all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Case
from benchmarks.plan_ours import FAST, GROWTH, MEDIUM, MEMORY, SLOW, ours, variants


def _theirs(key: str, name: str, module: str, task: str, messages: int, **more: Any) -> Case:  # noqa: ANN401  -- as above
    return Case(key=key, name=name, module=module, task=task, messages=messages, **more)


# Until its copy is confirmed, an original occupies its place in the prefetch window.
# Both get as many messages: the more stand in a queue, the slower the broker is.
MIX: dict[str, Any] = {"messages": SLOW, "prefetch": 1000, "warmup": 2000}

# A prefetch count that isn't set has grown by then: it does so after a second.
DEFAULTS, GROWN = {"defaults": True}, 60_000

CONSUME = [
    ours("ours.ack", "all acked"),
    ours("ours.observer", "all acked, observed", options={"observer": True}),
    ours("ours.headers", "all acked, headers read", "headers"),
    ours("ours.reject", "10 % NACK", "reject"),
    ours("ours.mixed", "1 % NACK, 10 % REQUEUE", "mixed", **MIX),
    ours("ours.mixed-500", "the same at prefetch 500", "mixed", SLOW),
    ours("ours.default", "defaults", options=DEFAULTS, warmup=GROWN),
    ours(
        "ours.quorum",
        "all acked, quorum queue",
        messages=MEDIUM,
        queue_type="quorum",
        options={"queue_type": "quorum"},
    ),
    ours("ours.single", "`Consumer`, one by one", messages=MEDIUM, module="ours_single"),
    ours(
        "ours.single-default",
        "`Consumer`, defaults",
        messages=MEDIUM,
        module="ours_single",
        options=DEFAULTS,
        warmup=GROWN,
    ),
    _theirs("librabbitmq", "librabbitmq (C), multiple ack", "librabbitmq", "multiple", FAST),
    _theirs("pika", "pika SelectConnection, multiple ack", "pika_select", "multiple", MEDIUM),
    _theirs(
        "pika.blocking",
        "pika BlockingConnection, multiple ack",
        "pika_blocking",
        "multiple",
        MEDIUM,
    ),
    _theirs("py-amqp", "py-amqp, multiple ack", "py_amqp", "multiple", MEDIUM),
    _theirs("aiormq", "aiormq, multiple ack", "aiormq_multiple", "multiple", SLOW),
    _theirs("aio-pika.multiple", "aio-pika, multiple ack", "aio_pika_consume", "multiple", SLOW),
    _theirs("aio-pika.each", "aio-pika, ack each", "aio_pika_consume", "each", SLOW),
    _theirs("aio-pika.mixed", "aio-pika, the same mix by hand", "aio_pika_consume", "mixed", **MIX),
    _theirs(
        "original",
        "the first release, 0.1.0: all acked",
        "original",
        "ack",
        SLOW,
        environment="original",
    ),
    _theirs(
        "original.mixed",
        "the first release, 0.1.0: the same mix",
        "original",
        "mixed",
        SLOW // 2,
        environment="original",
    ),
    _theirs(
        "celery-batches",
        "celery-batches, solo pool",
        "celery_solo",
        "ack",
        SLOW,
        environment="celery",
        shape="celery",
    ),
    _theirs(
        "faststream",
        "FastStream, one call each",
        "faststream_single",
        "ack",
        SLOW // 2,
        environment="faststream",
    ),
]

PUBLISH = [
    ours(
        "ours.publish", "`publish_many` of 100", "many", MEDIUM, module="ours_publish", fill=False
    ),
    *(
        _theirs(key, name, module, task, messages, fill=False)
        for key, name, module, task, messages in [
            ("pika.100", "pika SelectConnection, 100 at once", "pika_publish", "select", MEDIUM),
            ("pika.each", "pika BlockingConnection, each", "pika_publish", "blocking", SLOW // 4),
            ("py-amqp.each", "py-amqp, each", "py_amqp_publish", "each", SLOW // 4),
            ("aio-pika.gather", "aio-pika, `gather` of 100", "aio_pika_publish", "gather", SLOW),
            ("aio-pika.sequential", "aio-pika, each", "aio_pika_publish", "sequential", SLOW // 4),
        ]
    ),
]

REQUEUE = [
    ours("ours.requeue", "all REQUEUE", "requeue", MEDIUM),
    _theirs(
        "aio-pika.requeue",
        "aio-pika, by hand, 100 copies at once",
        "aio_pika_consume",
        "requeue",
        SLOW,
    ),
]


AMQP10 = [
    *(
        ours(
            f"amqp10.{wire}",
            f'all acked, wire="{wire}"',
            queue_type="quorum",
            messages=SLOW,
            options={"queue_type": "quorum", "wire": wire},
        )
        for wire in ("fast", "amqp10")
    ),
    _theirs(
        "amqp10.official",
        "rabbitmq-amqp-python-client, accept each",
        "official_amqp10",
        "each",
        environment="amqp10",
        queue_type="quorum",
        messages=SLOW // 4,
    ),
]
"""On a quorum queue of RabbitMQ 4."""


def sections(*, has_wire: bool) -> dict[str, Sequence[Case]]:
    """Return all cases by section, in the order of the report."""
    return {
        "consume": CONSUME,
        "publish": PUBLISH,
        "requeue": REQUEUE,
        **({"amqp10": AMQP10} if has_wire else {}),
        "variants": variants(has_wire=has_wire),
        "growth": GROWTH,
        "memory": MEMORY,
    }


ROUNDS = {
    "consume": 5,
    "publish": 5,
    "requeue": 5,
    "amqp10": 5,
    "variants": 3,
    "growth": 3,
    "memory": 1,
}
"""How often each section is measured. Ratios are of one round's figures, so they need most."""
