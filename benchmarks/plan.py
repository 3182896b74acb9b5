"""What is compared with what, on how many messages?

Slow clients get fewer, so that a round takes minutes. The cases of a section are measured in turn,
and all of them anew in each round, so that whatever else the machine does meets them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Case

FAST, MEDIUM, SLOW = 200_000, 60_000, 20_000
MILLION = 1_000_000
KIB, MIB = 2**10, 2**20
IN_HAND = 64 * MIB
"""Most bytes of bodies in a client's hands, unless that is what is measured."""


def _ours(key: str, name: str, task: str = "ack", messages: int = FAST, **more: Any) -> Case:  # noqa: ANN401  -- Case has the types
    fields = {"module": "ours_batch", "is_ours": True, **more}
    return Case(key=key, name=f"aio-pika-batch: {name}", task=task, messages=messages, **fields)


def _theirs(key: str, name: str, module: str, task: str, messages: int, **more: Any) -> Case:  # noqa: ANN401  -- as above
    return Case(key=key, name=name, module=module, task=task, messages=messages, **more)


def _sized(body: int, messages: int) -> dict[str, Any]:
    """Bodies of a size, and not more of them at a time than fit in a client's hands."""
    prefetch = max(10, min(500, IN_HAND // body))
    return {
        "body": body,
        "messages": messages,
        "prefetch": prefetch,
        "batch": prefetch // 5,
        "warmup": 2 * prefetch,
    }


CONSUME = [
    _ours("ours.ack", "all acked"),
    _ours("ours.observer", "all acked, observed", options={"observer": True}),
    _ours("ours.headers", "all acked, headers read", "headers"),
    _ours("ours.reject", "10 % NACK", "reject"),
    _ours("ours.mixed", "1 % NACK, 10 % REQUEUE", "mixed", MEDIUM),
    _ours("ours.single", "`Consumer`, one by one", messages=MEDIUM, module="ours_single"),
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
    _theirs("aio-pika.mixed", "aio-pika, the same mix by hand", "aio_pika_consume", "mixed", SLOW),
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
    _ours(
        "ours.publish", "`publish_many` of 100", "many", MEDIUM, module="ours_publish", fill=False
    ),
    *(
        _theirs(key, name, module, task, messages, fill=False)
        for key, name, module, task, messages in [
            ("pika.100", "pika SelectConnection, 100 at once", "pika_publish", "select", MEDIUM),
            ("pika.each", "pika BlockingConnection, each", "pika_publish", "blocking", SLOW // 2),
            ("py-amqp.each", "py-amqp, each", "py_amqp_publish", "each", SLOW // 2),
            ("aio-pika.gather", "aio-pika, `gather` of 100", "aio_pika_publish", "gather", SLOW),
            ("aio-pika.sequential", "aio-pika, each", "aio_pika_publish", "sequential", SLOW // 2),
        ]
    ),
]

REQUEUE = [
    _ours("ours.requeue", "all REQUEUE", "requeue", MEDIUM),
    _theirs(
        "aio-pika.requeue",
        "aio-pika, by hand, 100 copies at once",
        "aio_pika_consume",
        "requeue",
        SLOW,
    ),
]


def variants(*, has_wire: bool) -> list[Case]:
    """Our library beside itself; with both wires, where there are two."""
    sizes = {
        "64 B": _sized(64, FAST),
        "1 KiB": _sized(KIB, FAST),
        "64 KiB": _sized(64 * KIB, SLOW // 2),
    }
    wires = ["fast", "plain"] if has_wire else []
    return [
        *(_ours(f"asyncio-{each['body']}", f"{size}", **each) for size, each in sizes.items()),
        *(
            _ours(f"uvloop-{each['body']}", f"{size}, uvloop", options={"uvloop": True}, **each)
            for size, each in sizes.items()
        ),
        *(
            _ours(f"workers-{count}", f"num_workers={count}", options={"num_workers": count})
            for count in (1, 2, 4, 8)
        ),
        *(
            _ours(f"wire-{wire}", f'wire="{wire}"', messages=MEDIUM, options={"wire": wire})
            for wire in wires
        ),
    ]


GROWTH = [
    *(
        _ours(
            f"batch-{batch}",
            f"batch of {batch:,}",
            messages=MEDIUM,
            batch=batch,
            prefetch=max(500, 2 * batch),
        )
        for batch in (1, 10, 100, 1000, 5000)
    ),
    *(
        _ours(
            f"prefetch-{count}",
            f"prefetch of {count:,}",
            messages=MEDIUM,
            batch=min(100, count // 2),
            prefetch=count,
        )
        for count in (10, 100, 1000, 10_000)
    ),
    *(
        _ours(f"body-{body}", f"bodies of {body:,} bytes", **_sized(body, messages))
        for body, messages in [
            (64, FAST),
            (KIB, FAST),
            (16 * KIB, SLOW),
            (128 * KIB, SLOW // 5),
            (MIB, 400),
            (8 * MIB, 60),
        ]
    ),
    *(
        _ours(
            f"backlog-{backlog}",
            f"backlog of {backlog:,}",
            messages=backlog * 9 // 10,
            warmup=backlog // 10,
        )
        for backlog in (1000, 10_000, 100_000, MILLION)
    ),
]

MEMORY = [
    _ours("million", "a million messages", messages=MILLION),
    *(
        _ours(
            f"memory-{prefetch}-{body}",
            f"prefetch {prefetch}, bodies of {body // KIB} KiB, slow handler",
            "hold",
            body=body,
            messages=prefetch,
            warmup=prefetch,
            prefetch=prefetch,
            batch=prefetch // 5,
        )
        for prefetch in (100, 500)
        for body in (16 * KIB, 64 * KIB, 256 * KIB)
    ),
]


def sections(*, has_wire: bool) -> dict[str, Sequence[Case]]:
    """Everything, by section, in the order of the report."""
    return {
        "consume": CONSUME,
        "publish": PUBLISH,
        "requeue": REQUEUE,
        "variants": variants(has_wire=has_wire),
        "growth": GROWTH,
        "memory": MEMORY,
    }


ROUNDS = {"consume": 5, "publish": 5, "requeue": 5, "variants": 3, "growth": 3, "memory": 1}
"""How often each section is measured. Ratios are of one round's figures, so they need most."""
