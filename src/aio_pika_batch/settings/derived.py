"""Derives endpoint, topology, delays and start-up checks from a consumer's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from urllib.parse import unquote, urlsplit

from aio_pika_batch.core.config_checks import ConsumerProfile, adapts_prefetch
from aio_pika_batch.core.results import Result
from aio_pika_batch.core.retry import DelaySteps, make_delay_steps
from aio_pika_batch.core.topology_options import TopologyOptions, dead_letter_target
from aio_pika_batch.settings.consumer_settings import (
    BatchConsumerSettings,
    ConsumerSettings,
    plain_url,
)
from aio_pika_batch.transport import Endpoint


def endpoint(settings: ConsumerSettings, consumer: str) -> Endpoint:
    """Return where and how to connect.

    Args:
        consumer: The consumer's name; part of the connection's name unless one is configured.
    """
    password = settings.ssl_key_password
    return Endpoint(
        url=plain_url(settings),
        connect_timeout=settings.connect_timeout,
        heartbeat=settings.heartbeat,
        publish_timeout=settings.publish_timeout,
        connection_name=settings.connection_name or f"{consumer} ({settings.queue_name})",
        ssl_cafile=settings.ssl_cafile,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_key_password=None if password is None else password.get_secret_value(),
        wire=settings.wire,
    )


def virtual_host(url: str) -> str:
    """Return the virtual host of a URL; `/`, the default one, if it has none."""
    # Several URLs name nodes of one cluster, so any of them has the virtual host.
    return unquote(urlsplit(url.rsplit(",", maxsplit=1)[-1]).path[1:]) or "/"


def delay_steps(settings: ConsumerSettings) -> DelaySteps:
    """Return how long retries wait."""
    return make_delay_steps(
        settings.requeue_delay or 0.0, settings.requeue_backoff, settings.requeue_delay_max
    )


def topology_options(settings: ConsumerSettings) -> TopologyOptions:
    """Return what the settings say about queue, exchange and dead letters."""
    keys = settings.routing_key
    # Over AMQP 1.0 the consumer's own queue delays messages, or the consumer holds them. If it has
    # to use AMQP 0-9-1 after all, a wait queue is declared when it is needed.
    waits = settings.wire != "amqp10"
    options = TopologyOptions(
        queue_name=settings.queue_name,
        queue_durable=settings.queue_durable,
        queue_exclusive=settings.queue_exclusive,
        queue_auto_delete=settings.queue_auto_delete,
        queue_type=settings.queue_type,
        queue_arguments=settings.queue_arguments or {},
        exchange_name=settings.exchange_name,
        exchange_type=settings.exchange_type,
        exchange_durable=settings.exchange_durable,
        exchange_auto_delete=settings.exchange_auto_delete,
        exchange_internal=settings.exchange_internal,
        exchange_arguments=settings.exchange_arguments or {},
        routing_keys=() if keys is None else (keys,) if isinstance(keys, str) else tuple(keys),
        binding_arguments=settings.binding_arguments or {},
        dead_letter_exchange=settings.dead_letter_exchange,
        dead_letter_exchange_type=settings.dead_letter_exchange_type,
        dead_letter_routing_key=settings.dead_letter_routing_key,
        dead_letter_queue=settings.dead_letter_queue,
        broker_dead_letters=settings.broker_dead_letters,
        wait_levels=delay_steps(settings).steps_for(settings.max_requeue_attempts) if waits else (),
        declare=settings.declare,
    )
    # Retries in place need no copies, but a message that failed for good and has no destination is
    # published to its own queue again.
    has_retries = settings.max_requeue_attempts > 0 and not settings.ordered_by_key
    is_kept = settings.without_dead_letter == "retry" and dead_letter_target(options) is None
    return replace(options, republishes=has_retries or is_kept)


def has_adaptive_prefetch(settings: ConsumerSettings) -> bool:
    """Return whether `effective_prefetch` is only where the prefetch count begins."""
    # A count that is configured is kept.
    return "prefetch_count" not in settings.model_fields_set and adapts_prefetch(
        topology_options(settings), ordered=settings.ordered_by_key
    )


def consumer_profile(
    settings: ConsumerSettings, mapped_results: Iterable[Result]
) -> ConsumerProfile:
    """Return what the start-up checks look at.

    Args:
        mapped_results: The results in the consumer's `exception_results`.
    """
    batches = settings if isinstance(settings, BatchConsumerSettings) else None
    return ConsumerProfile(
        prefetch=settings.effective_prefetch,
        batch_size=batches.batch_size if batches else 1,
        batch_timeout=batches.batch_timeout if batches else 0.0,
        concurrency=settings.concurrency,
        process_timeout=settings.process_timeout,
        max_requeue_attempts=settings.max_requeue_attempts,
        failure_results={settings.unhandled_exception_action, *mapped_results},
        consumer_arguments=settings.consumer_arguments or {},
        retry_seconds=delay_steps(settings).total_seconds(settings.max_requeue_attempts),
        ordered=settings.ordered_by_key,
        adapts_prefetch=has_adaptive_prefetch(settings),
        rejects_undeliverable=settings.without_dead_letter == "reject",
        retry_count_header=settings.retry_count_header,
        wire=settings.wire,
    )
