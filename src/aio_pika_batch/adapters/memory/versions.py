"""Lists the differences between the imitated versions of RabbitMQ.

Everything that depends on the version is a field of `VersionRules`. The other modules read the
field and never compare versions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aio_pika_batch.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRules:
    """How one version behaves; each rule was observed on a real broker of that version.

    Attributes:
        default_delivery_limit: The delivery limit of a quorum queue that is declared without one.
        requeues_to_back: Whether a quorum queue without a delivery limit puts a message that a
            consumer requeues at its back.
        nack_counts: Whether `basic.nack(requeue=True)` counts towards a delivery limit, as
            `basic.reject` always does.
        sends_acquired_count: Whether quorum queues send `x-acquired-count`: how often a message
            was delivered without being settled for good.
        sends_zero_delivery_count: Whether the first delivery has `x-delivery-count`.
        trusts_client_deaths: Whether the broker believes an `x-death` header that a client sends.
        sends_last_death: Whether dead letters have `x-last-death-*` headers.
        keeps_cc: Whether a dead letter keeps its `CC` header although its queue has a dead-letter
            routing key.
        dead_letters_redelivered: Whether a dead letter that was delivered before counts as
            redelivered.
        quorum_expires: Whether quorum queues support time to live, `reject-publish`, and dead
            letters that are kept until another queue has taken them.
        unknown_type_closes_connection: Whether an unknown exchange type closes the connection.
    """

    version: str
    default_delivery_limit: int | None
    requeues_to_back: bool
    nack_counts: bool
    sends_acquired_count: bool
    sends_zero_delivery_count: bool
    trusts_client_deaths: bool
    sends_last_death: bool
    keeps_cc: bool
    dead_letters_redelivered: bool
    quorum_expires: bool
    unknown_type_closes_connection: bool


_V3_10 = VersionRules(
    version="3.10",
    default_delivery_limit=None,
    requeues_to_back=True,
    nack_counts=True,
    sends_acquired_count=False,
    sends_zero_delivery_count=True,
    trusts_client_deaths=True,
    sends_last_death=False,
    keeps_cc=False,
    dead_letters_redelivered=False,
    quorum_expires=True,
    unknown_type_closes_connection=True,
)
# 3.10 brought time to live, reject-publish and at-least-once to quorum queues.
_V3_8 = replace(_V3_10, version="3.8", requeues_to_back=False, quorum_expires=False)
# 4.0 gave quorum queues a delivery limit by default, and stopped reading clients' x-death.
_V4_0 = replace(
    _V3_10,
    version="4.0",
    default_delivery_limit=20,
    requeues_to_back=False,
    sends_zero_delivery_count=False,
    trusts_client_deaths=False,
    sends_last_death=True,
    keeps_cc=True,
    unknown_type_closes_connection=False,
)
# 4.3 counts failures of processing only, and tells them apart from mere returns.
_V4_3 = replace(
    _V4_0,
    version="4.3",
    nack_counts=False,
    sends_acquired_count=True,
    dead_letters_redelivered=True,
)

_RULES = {each.version: each for each in (_V3_8, _V3_10, _V4_0, _V4_3)}

NEWEST = "4.3"


def version_rules(version: str) -> VersionRules:
    """Return the rules of a version.

    Raises:
        ConfigurationError: It is not imitated.
    """
    try:
        return _RULES[version]
    except KeyError:
        known = ", ".join(_RULES)
        raise ConfigurationError(
            f"the broker in memory can't imitate RabbitMQ {version!r}; use one of {known}"
        ) from None
