"""TLS connections to RabbitMQ, and connections that would not be secure.

They use a TLS listener of RabbitMQ itself, with certificates made for the run.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from aio_pika_batch import (
    AccessRefused,
    BatchConsumer,
    BatchConsumerSettings,
    BrokerUnavailable,
    ConfigurationError,
    MessageResult,
)
from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from tests.integration.helpers import publish, ready, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aio_pika.abc import AbstractChannel

    from aio_pika_batch import Message
    from tests.support.find import RunningBroker

pytestmark = [pytest.mark.needs_node, pytest.mark.usefixtures("on_both_wires")]

_KEY_PASSWORD = "p@ss w0rd/ü"


@dataclass(frozen=True)
class Certificates:
    """The certificates and keys of the broker and its clients, as files."""

    folder: Path
    authority: trustme.CA
    stranger: trustme.CA

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def make(self) -> None:
        self.authority.cert_pem.write_to_path(self.file("ca.pem"))
        self.stranger.cert_pem.write_to_path(self.file("stranger.pem"))
        yesterday = datetime.now(UTC) - timedelta(days=1)
        for name, certificate in {
            "good": self.authority.issue_cert("localhost"),
            "expired": self.authority.issue_cert("localhost", not_after=yesterday),
            "client": self.authority.issue_cert("client@localhost", common_name="guest"),
            "late-client": self.authority.issue_cert("client@localhost", not_after=yesterday),
            "forged-client": self.stranger.issue_cert("client@localhost"),
        }.items():
            certificate.private_key_pem.write_to_path(self.file(f"{name}.key"))
            for each in certificate.cert_chain_pems:
                each.write_to_path(self.file(f"{name}.pem"), append=True)
        key = load_pem_private_key(Path(self.file("client.key")).read_bytes(), None)
        encryption = BestAvailableEncryption(_KEY_PASSWORD.encode())
        Path(self.file("locked.key")).write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        )

    def show(self, name: str) -> None:
        """Make the broker use this certificate from now on, after it has forgotten the last one."""
        for suffix in ("pem", "key"):
            shutil.copy(self.file(f"{name}.{suffix}"), self.file(f"server.{suffix}"))


@dataclass(frozen=True)
class Secured:
    """A broker with two TLS listeners: one that accepts any client, one that requires a
    certificate.
    """

    node: RabbitMQ
    certificates: Certificates
    port: int
    strict_port: int

    def url(self, *, host: str = "localhost", strict: bool = False) -> str:
        return f"amqps://guest:guest@{host}:{self.strict_port if strict else self.port}/"

    def show(self, name: str) -> None:
        self.certificates.show(name)
        self.node.eval("ssl:clear_pem_cache().")


@pytest.fixture(scope="module")
def secured(broker: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A separate node: its listeners must not stay on the one that all tests share."""
    assert broker.node is not None
    folder = tmp_path_factory.mktemp("certificates")
    certificates = Certificates(folder, trustme.CA(), trustme.CA())
    certificates.make()
    certificates.show("good")
    port, strict_port = free_port(), free_port()
    options = {
        "cacertfile": certificates.file("ca.pem"),
        "certfile": certificates.file("server.pem"),
        "keyfile": certificates.file("server.key"),
    }
    conf = [
        f"listeners.ssl.1 = {LOCALHOST}:{port}",
        *(f"ssl_options.{name} = {value}" for name, value in options.items()),
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = false",
        "ssl_cert_login_from = common_name",
        *(
            f"auth_mechanisms.{number} = {mechanism}"
            for number, mechanism in enumerate(("PLAIN", "AMQPLAIN", "EXTERNAL"), 1)
        ),
    ]
    node = RabbitMQ(
        broker.node.server,
        tmp_path_factory.mktemp("secured"),
        conf=conf,
        plugins=["rabbitmq_auth_mechanism_ssl"],
        name="tls",
    )
    with node:
        # Whether a certificate is wanted holds for all listeners that are configured.
        erlang = ",".join(f'{{{name},"{value}"}}' for name, value in options.items())
        node.eval(
            f'rabbit_networking:start_ssl_listener({{"{LOCALHOST}",{strict_port},auto}},'
            f"[{erlang},{{verify,verify_peer}},{{fail_if_no_peer_cert,true}}],2)."
        )
        yield Secured(node, certificates, port, strict_port)


@pytest.fixture
def amqp_url(secured: Secured) -> str:
    """The same broker without TLS, to declare and to inspect."""
    return secured.node.url


class Tally(BatchConsumer):
    """Counts what it handles; one message in ten is requeued once.

    Attributes:
        enough: How many it acks before it stops.
    """

    def __init__(self, settings: BatchConsumerSettings) -> None:
        super().__init__(settings)
        self.acked = Counter[bytes]()
        self.enough = 1 << 30

    async def process_messages(self, messages: Sequence[Message]):
        for message in messages:
            if message.retry_count == 0 and message.body.endswith(b"7"):
                yield MessageResult.REQUEUE
            else:
                self.acked[message.body] += 1
                yield MessageResult.ACK
        if self.acked.total() >= self.enough:
            await self.stop()  # which returns at once: the drain waits for this handler


def consumer(name: str, url: str, **options: Any) -> Tally:
    """Return a consumer that uses TLS."""
    options.setdefault("queue_name", name)
    return Tally(BatchConsumerSettings(url=url, batch_size=50, batch_timeout=0.05, **options))


async def refusal(error: type[Exception], name: str, url: str, **options: Any) -> str:
    """Start a consumer that must fail; return the text of the error."""
    with pytest.raises(error) as caught:
        await consumer(name, url, **options).start()
    return str(caught.value)


async def test_everything_works_over_tls(
    secured: Secured, channel: AbstractChannel, name: str
) -> None:
    """Deliveries, acks and copies; a stop in between loses and repeats nothing."""
    bodies = [b"%04d" % number for number in range(2_000)]
    await channel.declare_queue(name, durable=True)
    await publish(channel, bodies, routing_key=name)
    settings = {"ssl_cafile": secured.certificates.file("ca.pem"), "declare": False}

    first = consumer(name, secured.url(), **settings)
    first.enough = 200
    await first.run()
    assert first.acked.total() < len(bodies)
    second = consumer(name, secured.url(), **settings)
    async with second:
        await until(lambda: first.acked.total() + second.acked.total() >= len(bodies))

    assert Counter(bodies) == first.acked + second.acked
    assert 0 == await ready(secured.node.url, name)


async def test_an_unknown_certificate_authority(secured: Secured, name: str) -> None:
    """It is neither among the named ones nor the system's."""
    for trusted in ({"ssl_cafile": secured.certificates.file("stranger.pem")}, {}):
        text = await refusal(AccessRefused, name, secured.url(), **trusted)
        assert "does not verify" in text
        assert "set ssl_cafile to the authority that signed it" in text


async def test_a_certificate_for_another_host(secured: Secured, name: str) -> None:
    """The certificate is valid, but for another name."""
    url = secured.url(host=LOCALHOST)
    authority = secured.certificates.file("ca.pem")

    text = await refusal(AccessRefused, name, url, ssl_cafile=authority)

    assert LOCALHOST in text
    assert "connect by a name that is in it" in text


async def test_an_expired_certificate(secured: Secured, name: str) -> None:
    """Once the broker has a new one, the consumer connects without a change."""
    authority = secured.certificates.file("ca.pem")
    await asyncio.to_thread(secured.show, "expired")
    try:
        text = await refusal(AccessRefused, name, secured.url(), ssl_cafile=authority)
    finally:
        await asyncio.to_thread(secured.show, "good")

    assert "expired; renew it on the broker" in text
    async with consumer(name, secured.url(), ssl_cafile=authority, queue_exclusive=True) as well:
        assert well.is_healthy


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_client_certificate(secured: Secured, name: str, encrypted: bool) -> None:
    """If the broker requires one; its key may be encrypted."""
    options = {"ssl_keyfile": secured.certificates.file("client.key")}
    if encrypted:
        options = {
            "ssl_keyfile": secured.certificates.file("locked.key"),
            "ssl_key_password": _KEY_PASSWORD,
        }
    async with consumer(
        name,
        secured.url(strict=True),
        ssl_cafile=secured.certificates.file("ca.pem"),
        ssl_certfile=secured.certificates.file("client.pem"),
        queue_exclusive=True,
        **options,
    ) as known:
        assert known.is_healthy


async def test_a_client_logs_in_by_its_certificate(secured: Secured, name: str) -> None:
    """If the broker supports that: no password is sent or needed."""
    files = {
        "ssl_cafile": secured.certificates.file("ca.pem"),
        "ssl_certfile": secured.certificates.file("client.pem"),
        "ssl_keyfile": secured.certificates.file("client.key"),
    }
    url = secured.url().replace("guest:guest@", "nobody:wrong@")
    async with consumer(name, f"{url}?auth=external", queue_exclusive=True, **files) as known:
        assert known.is_healthy
    assert "check user and password" in await refusal(AccessRefused, name, url, **files)


@pytest.mark.parametrize(
    ("shown", "advice"),
    [
        (None, "may want a client certificate: set ssl_certfile and ssl_keyfile"),
        ("forged-client", "does not accept the client certificate"),
        pytest.param(
            "late-client", "does not accept the client certificate", marks=pytest.mark.long
        ),
    ],
)
async def test_a_client_without_a_valid_certificate(
    secured: Secured, name: str, shown: str | None, advice: str
) -> None:
    """The error names the cause, although the broker reports it only after the handshake."""
    options = {"ssl_cafile": secured.certificates.file("ca.pem")}
    if shown is not None:
        options["ssl_certfile"] = secured.certificates.file(f"{shown}.pem")
        options["ssl_keyfile"] = secured.certificates.file(f"{shown}.key")

    text = await refusal(AccessRefused, name, secured.url(strict=True), **options)

    assert "TLS handshake failed" in text
    assert advice in text


async def test_disabled_verification_is_logged(
    secured: Secured, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It must be asked for in the URL, and is logged as a warning each time."""
    url = f"{secured.url(host=LOCALHOST)}?no_verify_ssl=1"
    async with consumer(name, url, queue_exclusive=True):
        pass

    [record] = [each for each in caplog.records if "aio_pika_batch.tls" == each.name]
    assert logging.WARNING == record.levelno
    assert "can read and change all data" in record.getMessage()


async def test_there_is_no_fallback(secured: Secured, name: str) -> None:
    """Neither from TLS to plain text nor the other way round."""
    clear = secured.node.url
    assert "does not speak TLS" in await refusal(
        AccessRefused, name, clear.replace("amqp://", "amqps://")
    )
    # Which only waits: the broker may be one that hangs up as it starts.
    late = consumer(name, secured.url().replace("amqps://", "amqp://"), connect_timeout=1)
    starting = asyncio.create_task(late.start())
    try:
        await until(lambda: late.status().workers and late.status().workers[0].last_error)
        assert BrokerUnavailable.__name__ in (late.status().workers[0].last_error or "")
    finally:
        await late.stop()
        await asyncio.gather(starting, return_exceptions=True)
    authority = secured.certificates.file("ca.pem")
    assert "write amqps://" in await refusal(ConfigurationError, name, clear, ssl_cafile=authority)
