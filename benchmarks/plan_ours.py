"""Lists the cases that compare this library with itself, and how its cost grows."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import Case

FAST, MEDIUM, SLOW = 200_000, 60_000, 20_000
MILLION = 1_000_000
KIB, MIB = 2**10, 2**20
IN_HAND = 64 * MIB
"""Most bytes of bodies in a client's hands, unless that is what is measured."""


def ours(key: str, name: str, task: str = "ack", messages: int = FAST, **more: Any) -> Case:  # noqa: ANN401  -- Case has the types
    """Return a case of this library."""
    fields = {"module": "ours_batch", "is_ours": True, **more}
    return Case(key=key, name=f"aio-pika-batch: {name}", task=task, messages=messages, **fields)


def _sized(body: int, messages: int) -> dict[str, Any]:
    """Return a case with bodies of a size, and a prefetch count that bounds the memory."""
    prefetch = max(10, min(500, IN_HAND // body))
    return {
        "body": body,
        "messages": messages,
        "prefetch": prefetch,
        "batch": prefetch // 5,
        "warmup": 2 * prefetch,
    }


def variants(*, has_wire: bool) -> list[Case]:
    """Return the cases of what users may choose, on both wires where there are two."""
    sizes = {
        "64 B": _sized(64, FAST),
        "1 KiB": _sized(KIB, FAST),
        "64 KiB": _sized(64 * KIB, SLOW // 2),
    }
    wires = ["fast", "plain"] if has_wire else []
    return [
        *(ours(f"asyncio-{each['body']}", f"{size}", **each) for size, each in sizes.items()),
        *(
            ours(f"uvloop-{each['body']}", f"{size}, uvloop", options={"uvloop": True}, **each)
            for size, each in sizes.items()
        ),
        *(
            ours(f"workers-{count}", f"num_workers={count}", options={"num_workers": count})
            for count in (1, 2, 4, 8)
        ),
        *(
            ours(f"wire-{wire}", f'wire="{wire}"', messages=MEDIUM, options={"wire": wire})
            for wire in wires
        ),
    ]


GROWTH = [
    *(
        ours(
            f"batch-{batch}",
            f"batch of {batch:,}",
            messages=MEDIUM,
            batch=batch,
            prefetch=max(500, 2 * batch),
        )
        for batch in (1, 10, 100, 1000, 5000)
    ),
    *(
        ours(
            f"prefetch-{count}",
            f"prefetch of {count:,}",
            messages=MEDIUM,
            batch=min(100, count // 2),
            prefetch=count,
        )
        for count in (10, 100, 1000, 10_000)
    ),
    *(
        ours(f"body-{body}", f"bodies of {body:,} bytes", **_sized(body, messages))
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
        ours(
            f"backlog-{backlog}",
            f"backlog of {backlog:,}",
            messages=backlog * 9 // 10,
            warmup=backlog // 10,
        )
        for backlog in (1000, 10_000, 100_000, MILLION)
    ),
]

MEMORY = [
    ours("million", "a million messages", messages=MILLION),
    *(
        ours(
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
