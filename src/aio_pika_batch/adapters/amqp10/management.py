"""Asks the broker about a queue over AMQP 1.0: its type and its arguments, without its policies.

RabbitMQ answers requests to the address `/management` over a pair of links of one name. They have
an AMQP session of their own, so that they do not interfere with the ids of the consuming one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import (
    CodecError,
    Described,
    Symbol,
    UByte,
    UInt,
    ULong,
    write,
)
from aio_pika_batch.adapters.amqp10.connection import (
    LAST_CHANNEL,
    Amqp10Connection,
    Disconnected,
)
from aio_pika_batch.adapters.amqp10.frames import ReceivedRecord, TransferredMessages, pack
from aio_pika_batch.adapters.amqp10.performatives import (
    Attach,
    Begin,
    Detach,
    End,
    Flow,
    Record,
    SourceTerminus,
    TargetTerminus,
    Transfer,
)
from aio_pika_batch.adapters.amqp10.sections import field, section
from aio_pika_batch.errors import BrokerUnavailable

_ADDRESS: Final = "/management"
_REPLY_TO: Final = "$me"
_NAME: Final = "management"
_SUBJECT: Final = 3
_OK: Final = "200"
_SENDING, _RECEIVING = UInt(0), UInt(1)
_WINDOW: Final = UInt(100)
_SETTLED: Final = True


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """What a broker knows about a queue.

    Attributes:
        type: `classic`, `quorum` or `stream`.
        arguments: Those that it was declared with.
    """

    type: str
    arguments: Mapping[str, Any]


async def look_up_queue(
    connection: Amqp10Connection, queue: str, timeout: float
) -> QueueInfo | None:
    """Return what the broker knows about a queue; None if it doesn't say.

    Raises:
        BrokerUnavailable: The connection was lost, or there was no answer in time.
    """
    events: asyncio.Queue[TransferredMessages | ReceivedRecord | Disconnected] = asyncio.Queue()
    connection.listen(events.put_nowait)

    def send(*records: Record, payload: bytes = b"") -> None:
        connection.write([pack(each, LAST_CHANNEL, payload=payload) for each in records])

    send(
        Begin(None, UInt(0), _WINDOW, _WINDOW, _RECEIVING),
        _link(_SENDING, SourceTerminus(_REPLY_TO), TargetTerminus(_ADDRESS)),
        _link(_RECEIVING, SourceTerminus(_ADDRESS), TargetTerminus(_REPLY_TO)),
        # Without the ids: 4.0 and 4.3 begin with different ones, and haven't named them yet.
        Flow(None, _WINDOW, UInt(0), _WINDOW, _RECEIVING, None, UInt(1)),
    )
    answer: QueueInfo | None = None
    is_asked = False
    try:
        async with asyncio.timeout(timeout):
            while True:
                match await events.get():
                    case Disconnected(reason):
                        raise BrokerUnavailable(f"{connection.address} closed: {reason}")
                    # The broker may take a request only after it has granted credit for it.
                    case ReceivedRecord(_, Flow(link_credit=int())) if not is_asked:
                        is_asked = True
                        send(
                            Transfer(_SENDING, UInt(0), b"0", UInt(0), _SETTLED),
                            payload=_request(queue),
                        )
                    case ReceivedRecord(_, Transfer(), payload):
                        answer = _answer(payload)
                        send(End())
                    case ReceivedRecord(_, Detach()):
                        send(End())
                    case ReceivedRecord(_, End(error)):
                        if error is not None:
                            send(End())
                        return answer
                    case _:
                        pass
    except TimeoutError as error:
        raise BrokerUnavailable(
            f"{connection.address} did not answer a question about queue {queue!r} within"
            f" {timeout:g} s"
        ) from error


def _link(handle: UInt, source: SourceTerminus, target: TargetTerminus) -> Attach:
    is_receiver = handle == _RECEIVING
    return Attach(
        _NAME,
        handle,
        is_receiver,
        snd_settle_mode=UByte(1),
        rcv_settle_mode=UByte(0),
        source=source,
        target=target,
        initial_delivery_count=None if is_receiver else UInt(0),
        properties={Symbol("paired"): True},
    )


def _request(queue: str) -> bytes:
    properties = ["0", None, f"/queues/{quote(queue, safe='')}", "GET", _REPLY_TO]
    return b"".join(
        write(Described(ULong(code), value))
        for code, value in ((spec.PROPERTIES, properties), (spec.AMQP_VALUE, None))
    )


def _answer(payload: bytes) -> QueueInfo | None:
    try:
        if field(section(payload, spec.PROPERTIES, list), _SUBJECT) != _OK:
            return None
        body = section(payload, spec.AMQP_VALUE, dict)
    except CodecError:
        return None
    kind, arguments = body.get("type"), body.get("arguments")
    if not isinstance(kind, str) or not isinstance(arguments, dict):
        return None
    return QueueInfo(str(kind), arguments)
