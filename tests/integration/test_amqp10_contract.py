"""A transport whose sessions use AMQP 1.0 keeps the contract, with either kind of queue."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch.adapters.aio_pika.tls import (
    create_context,
    handshake_error,
    tls_options,
    verification_error,
)
from aio_pika_batch.adapters.aio_pika.transport import AioPikaTransport
from aio_pika_batch.adapters.aio_pika.url import parse_url
from aio_pika_batch.adapters.amqp10.reaching import Peer
from aio_pika_batch.adapters.amqp10.session import Amqp10Session, open_session
from aio_pika_batch.testing.contract import Features, TransportContract
from tests.integration.helpers import parse_version
from tests.integration.test_contract import RabbitHarness, features, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from aio_pika_batch.adapters.aio_pika.url import Address
    from aio_pika_batch.errors import TransportError
    from aio_pika_batch.transport import Endpoint, Subscription
    from tests.support.find import RunningBroker


def peer_of(endpoint: Endpoint, address: Address) -> Peer:
    """What a session needs to know of an address."""

    def context() -> ssl.SSLContext:
        return create_context(tls_options(endpoint, address))

    def why_no_tls(error: ssl.SSLError) -> TransportError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return verification_error(error, address)
        return handshake_error(error, address)

    return Peer(
        where=str(address),
        host=address.host,
        port=address.port,
        user=address.user,
        password=address.password,
        vhost=address.vhost,
        name=address.options.get("name", endpoint.connection_name),
        heartbeat=int(address.options.get("heartbeat", endpoint.heartbeat)),
        external=address.options.get("auth", "plain") == "external",
        tls=context if address.tls else None,
        why_no_tls=why_no_tls,
    )


class Amqp10Transport(AioPikaTransport):
    """Declares, counts and publishes over 0-9-1, and consumes over 1.0."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self._peers = [peer_of(endpoint, address) for address in parse_url(endpoint.url)]

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Amqp10Session]:
        return open_session(self._peers, subscription, self._endpoint.connect_timeout)


@pytest.fixture(autouse=True)
def speaks_amqp10(broker: RunningBroker) -> None:
    """The local broker may be an older one; nox brings those that do."""
    if parse_version(broker) < (4, 0):
        pytest.skip(f"RabbitMQ {broker.version} does not speak AMQP 1.0 by itself")


@asynccontextmanager
async def opened10(broker: RunningBroker, kind: str) -> AsyncIterator[RabbitHarness]:
    """The same scene, with another transport."""
    async with opened(broker, "fast", kind) as harness:
        harness.transport = Amqp10Transport(harness.transport._endpoint)
        yield harness


def features10(broker: RunningBroker, kind: str) -> Features:
    """What can be done over AMQP 1.0."""
    return replace(
        features(broker, kind),
        exclusive_consumers=False,
        exclusive_queues=False,
        has_native=False,
    )


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_the_contract_is_kept(broker: RunningBroker, kind: str) -> None:
    """All of it but what AMQP 1.0 doesn't have."""
    contract = TransportContract(
        partial(opened10, broker, kind), features10(broker, kind), patience=30, quiet=0.3
    )
    report = await contract.run(at_once=8)
    report.raise_if_broken()
    assert len(report.kept) == len(contract.applicable)
