"""In what do the imitated versions of RabbitMQ differ?

Everything that depends on the version is a field here; the rest of the broker asks for the field and never
for the version.
"""

from __future__ import annotations

from dataclasses import dataclass

from aio_pika_batch.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Dialect:
    """One version's ways.

    Attributes:
        quorum_limit: The delivery limit of a quorum queue that names none.
        returns_to_back: Whether a quorum queue without a limit puts what a consumer returned at its back.
        nack_counts: Whether `basic.nack(requeue=True)` counts against a delivery limit, as
            `basic.reject` always does.
        tells_acquired: Whether quorum queues tell in `x-acquired-count` how often a message was handed out.
        reads_client_deaths: Whether an `x-death` header that a client publishes is taken for the truth.
        tells_last_death: Whether dead letters carry `x-last-death-*`, too.
        refuses_transient: Whether only exclusive queues may be non-durable.
    """

    version: str
    quorum_limit: int | None
    returns_to_back: bool
    nack_counts: bool
    tells_acquired: bool
    reads_client_deaths: bool
    tells_last_death: bool
    refuses_transient: bool


DIALECTS = {
    dialect.version: dialect
    for dialect in (
        Dialect(
            "3.10",
            quorum_limit=None,
            returns_to_back=True,
            nack_counts=True,
            tells_acquired=False,
            reads_client_deaths=True,
            tells_last_death=False,
            refuses_transient=False,
        ),
        Dialect(
            "4.0",
            quorum_limit=20,
            returns_to_back=False,
            nack_counts=True,
            tells_acquired=False,
            reads_client_deaths=False,
            tells_last_death=True,
            refuses_transient=False,
        ),
        Dialect(
            "4.3",
            quorum_limit=20,
            returns_to_back=False,
            nack_counts=False,
            tells_acquired=True,
            reads_client_deaths=False,
            tells_last_death=True,
            refuses_transient=True,
        ),
    )
}

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
