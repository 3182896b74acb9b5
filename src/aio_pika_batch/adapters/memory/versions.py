"""In what do the imitated versions of RabbitMQ differ?

Everything that depends on the version is a field here; the rest of the broker asks for the field
and never for the version.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aio_pika_batch.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One version's ways; each was seen on a real broker of that version.

    Attributes:
        quorum_limit: The delivery limit of a quorum queue that names none.
        returns_to_back: Whether a quorum queue without a limit puts what a consumer returned at
            its back.
        nack_counts: Whether `basic.nack(requeue=True)` counts against a delivery limit, as
            `basic.reject` always does.
        tells_acquired: Whether quorum queues tell in `x-acquired-count` how often they have handed
            a message out in vain.
        tells_zero: Whether `x-delivery-count` is there at the first delivery.
        reads_client_deaths: Whether an `x-death` header of a client's is taken for the truth.
        tells_last_death: Whether dead letters have `x-last-death-*` headers.
        keeps_copies: Whether a dead letter keeps its `CC` header although its queue names a
            dead-letter routing key.
        remembers_handing_out: Whether a dead letter counts as redelivered if it was handed out.
        quorum_expires: Whether quorum queues know times to live, `reject-publish`, and dead letters
            that are kept until another queue has them.
        unknown_type_ends_connection: Whether an unknown exchange type ends the connection.
    """

    version: str
    quorum_limit: int | None
    returns_to_back: bool
    nack_counts: bool
    tells_acquired: bool
    tells_zero: bool
    reads_client_deaths: bool
    tells_last_death: bool
    keeps_copies: bool
    remembers_handing_out: bool
    quorum_expires: bool
    unknown_type_ends_connection: bool


_V3_10 = Dialect(
    version="3.10",
    quorum_limit=None,
    returns_to_back=True,
    nack_counts=True,
    tells_acquired=False,
    tells_zero=True,
    reads_client_deaths=True,
    tells_last_death=False,
    keeps_copies=False,
    remembers_handing_out=False,
    quorum_expires=True,
    unknown_type_ends_connection=True,
)
_V3_8 = replace(_V3_10, version="3.8", returns_to_back=False, quorum_expires=False)
_V4_0 = replace(
    _V3_10,
    version="4.0",
    quorum_limit=20,
    returns_to_back=False,
    tells_zero=False,
    reads_client_deaths=False,
    tells_last_death=True,
    keeps_copies=True,
    unknown_type_ends_connection=False,
)
_V4_3 = replace(
    _V4_0,
    version="4.3",
    nack_counts=False,
    tells_acquired=True,
    remembers_handing_out=True,
)

DIALECTS = {each.version: each for each in (_V3_8, _V3_10, _V4_0, _V4_3)}

NEWEST = "4.3"


def dialect(version: str) -> Dialect:
    """The ways of a version.

    Raises:
        ConfigurationError: It is not imitated.
    """
    try:
        return DIALECTS[version]
    except KeyError:
        known = ", ".join(DIALECTS)
        raise ConfigurationError(
            f"the in-memory broker imitates RabbitMQ {known}; {version!r} is none of them"
        ) from None
