"""Write the reference of all settings from the models.

`python docs/generate_settings.py` writes `docs/settings.md`; a unit test fails if the page is out
of date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aio_pika_batch import BatchConsumerSettings, ConsumerSettings

PAGE = Path(__file__).with_name("settings.md")

INTRODUCTION = """\
# Settings

<!-- Written by docs/generate_settings.py: change the models, or the script, and run it. -->

Pass settings in code, or set environment variables. Values in code come first, then the
environment, then a file `.env`. The name of a variable is the prefix and the setting's name in
capitals: `AIO_PIKA_BATCH_QUEUE_NAME`.

Most consumers need only these:

- [`url`](#url) and [`queue_name`](#queue_name): where to consume from.
- [`dead_letter_queue`](#dead_letter_queue): where messages go that fail for good.
- [`batch_size`](#batch_size) and [`batch_timeout`](#batch_timeout): how large a batch becomes, and
  how long a message waits for it on a quiet queue.
- [`concurrency`](#concurrency): how many batches are handled at once.
- [`queue_type`](#queue_type): `quorum` for messages that must not be lost.
- [`process_timeout`](#process_timeout): a limit for handlers that may hang.

To see all settings of a consumer, with their values and where they come from, run
`aio-pika-batch check shop:importer --offline`.

## Settings in code and environment

A subclass can choose its own prefix. It applies to every setting, so the URL below is `MY_APP_URL`:

<!-- test: environment MY_APP_QUEUE_NAME=orders MY_APP_BATCH_SIZE=200 -->
```python
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import BatchConsumerSettings


class MySettings(BatchConsumerSettings):
    model_config = SettingsConfigDict(env_prefix="MY_APP_")


settings = MySettings()  # reads MY_APP_QUEUE_NAME, MY_APP_BATCH_SIZE, …
print(settings.queue_name, settings.batch_size)
```
<!-- test: prints orders 200 -->

A subclass can also add settings. Name it as the type parameter of your consumer: type checkers
then know the type of `self.settings`, and `Importer()` reads all values from the environment
([more about type hints](how-it-works.md#type-hints-and-your-own-constructor)):

<!-- test: environment MY_APP_QUEUE_NAME=orders MY_APP_DATABASE=postgresql:///shop -->
```python
from collections.abc import AsyncIterator

from pydantic_settings import SettingsConfigDict

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult


class MySettings(BatchConsumerSettings):
    model_config = SettingsConfigDict(env_prefix="MY_APP_")

    database: str


class Importer(BatchConsumer[MySettings]):
    async def process_messages(self, messages: list[Message]) -> AsyncIterator[MessageResult]:
        print("to", self.settings.database)
        for _ in messages:
            yield MessageResult.ACK


print(Importer().settings.database)
```
<!-- test: prints postgresql:///shop -->

- Times are in seconds.
- Write dictionaries as JSON. Separate routing keys by commas, or write a list: `orders.#,refunds`
  or `["orders.#", "refunds"]`. A key that contains a comma, a space or a quote needs the list.
- An invalid value, and an unknown name in code, raise a
  [`ConfigurationError`](errors.md#configurationerror) that names the setting.
- A variable with the prefix that isn't a setting is ignored. If it looks like one, a warning and
  `aio-pika-batch check` say which one you probably mean.
- Passwords are masked wherever settings are shown.
"""

GROUPS = {
    "Broker and queue": ("url", "queue_name"),
    "Batches": (
        "batch_size",
        "batch_timeout",
        "batch_max_bytes",
        "settle",
        "settle_interval",
        "isolate_failures",
        "isolate_limit",
    ),
    "Workers": ("num_workers", "concurrency", "ordered_by_key", "prefetch_count"),
    "Results and retries": (
        "unhandled_exception_action",
        "process_timeout",
        "max_requeue_attempts",
        "requeue_delay",
        "requeue_backoff",
        "requeue_delay_max",
        "requeue_hold",
        "retry_count_header",
    ),
    "Dead letters": (
        "dead_letter_queue",
        "dead_letter_exchange",
        "dead_letter_exchange_type",
        "dead_letter_routing_key",
        "broker_dead_letters",
        "without_dead_letter",
        "dead_letter_exception_message",
    ),
    "Crashes": ("crash_suspect_after", "crash_limit"),
    "Declaring the queue": (
        "queue_type",
        "queue_durable",
        "queue_exclusive",
        "queue_auto_delete",
        "queue_arguments",
        "consumer_arguments",
        "declare",
    ),
    "Exchange and bindings": (
        "exchange_name",
        "exchange_type",
        "exchange_durable",
        "exchange_auto_delete",
        "exchange_internal",
        "exchange_arguments",
        "routing_key",
        "binding_arguments",
    ),
    "Circuit breaker": (
        "breaker_threshold",
        "breaker_window",
        "breaker_min_samples",
        "breaker_pause",
        "breaker_pause_max",
    ),
    "Timeouts and health": (
        "shutdown_timeout",
        "stuck_after",
        "connect_timeout",
        "publish_timeout",
        "heartbeat",
        "reconnect_delay",
        "reconnect_delay_max",
    ),
    "Connection": (
        "connection_name",
        "ssl_cafile",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_key_password",
        "wire",
    ),
}
"""Every setting, in the order of the page. One that is missing here stops the script."""


WHEN = {
    "url": "Set it for each environment, best by its variable, because it contains a password.",
    "queue_name": "Always set it.",
    "batch_size": "Raise it if your database or API handles larger batches efficiently.",
    "batch_timeout": "Lower it if messages on a quiet queue must not wait. A busy queue never"
    " reaches it.",
    "batch_max_bytes": "Set it if bodies are large, or if your API limits the size of a request.",
    "settle": '`"yield"` if a handler needs long for each message: a crash then repeats less.'
    ' `"atomic"` if it yields inside a transaction. See'
    " [When results are settled](how-it-works.md#when-results-are-settled).",
    "settle_interval": "Rarely. Lower it if a crash must repeat even less.",
    "isolate_failures": "Turn it on if your handler writes its batch as a whole: one bad row then"
    " affects one message. See [One bad row](how-it-works.md#one-bad-row).",
    "isolate_limit": "Raise it if a batch may contain many bad messages.",
    "num_workers": "Raise it if one connection isn't enough. Prefer `concurrency` for handlers that"
    " wait. See [Scaling](scaling.md).",
    "concurrency": "Raise it if your handler waits for I/O.",
    "ordered_by_key": "Turn it on if messages of one key must keep their order. See"
    " [Order by key](how-it-works.md#order-by-key).",
    "prefetch_count": "Rarely: it adapts if it isn't set. A value that you set is kept, for example"
    " to limit what a worker holds. See"
    " [How much a consumer holds](guarantees.md#how-much-a-consumer-holds).",
    "unhandled_exception_action": "`NACK` if a retry never helps. See also `exception_results`"
    " for single [exceptions](how-it-works.md#what-your-handler-yields).",
    "process_timeout": "Set it if a handler may hang. RabbitMQ takes messages back after 30 minutes"
    " (its `consumer_timeout`).",
    "max_requeue_attempts": "Raise it if failures last long; 0 if a retry never helps.",
    "requeue_delay": "Set it if failed messages should wait in RabbitMQ instead of in the consumer,"
    " so that they take up no prefetch. See [Retries](guarantees.md#retries-that-wait).",
    "requeue_backoff": "1 for constant delays.",
    "requeue_delay_max": "Lower it if messages must be retried sooner after an outage.",
    "requeue_hold": "Rarely. Raise it if your dead-letter queue is often full for a short time.",
    "retry_count_header": "Only if other programs use this header.",
    "dead_letter_queue": "Always set it. Without it, messages that fail for good are retried with"
    " growing delays, and messages that get NACK are discarded.",
    "dead_letter_exchange": "Set it if dead letters go to an existing exchange.",
    "dead_letter_exchange_type": "Set it if a new exchange must have another type.",
    "dead_letter_routing_key": "Set it if the dead-letter queue is bound by one key.",
    "broker_dead_letters": "Turn it off if other programs declare the queue without these"
    " arguments, or if a policy has the same effect.",
    "without_dead_letter": "`reject` if you want to lose messages that fail for good.",
    "dead_letter_exception_message": "Turn it off if exceptions may quote private data.",
    "crash_suspect_after": "Raise it if processes are often killed for other reasons.",
    "crash_limit": "Lower it if a policy sets a delivery limit below it.",
    "queue_type": '`"quorum"` for messages that must not be lost, and to stop poison messages that'
    " crash their process.",
    "queue_durable": "`False` for a queue whose messages may be lost.",
    "queue_exclusive": "`True` for a private queue of one process.",
    "queue_auto_delete": "`True` for a temporary queue.",
    "queue_arguments": "For a TTL, a length limit, a delivery limit or a single active consumer.",
    "consumer_arguments": "For a consumer priority.",
    "declare": "`False` if an administrator declares the topology (`aio-pika-batch topology`).",
    "exchange_name": "Set it if publishers use an exchange.",
    "exchange_type": "It must be the type that publishers expect.",
    "exchange_durable": "It must match an existing exchange.",
    "exchange_auto_delete": "It must match an existing exchange.",
    "exchange_internal": "It must match an existing exchange.",
    "exchange_arguments": "It must match an existing exchange.",
    "routing_key": "Set it if publishers use routing keys.",
    "binding_arguments": "For a headers exchange.",
    "breaker_threshold": "Set it, for example to 0.5, to stop consuming while everything fails. See"
    " [the circuit breaker](how-it-works.md#pausing-while-everything-fails).",
    "breaker_window": "Raise it for queues with few messages.",
    "breaker_min_samples": "Lower it for queues with few messages.",
    "breaker_pause": "Set it to the time that your dependency needs to recover.",
    "breaker_pause_max": "Lower it if consuming must resume sooner after a long outage.",
    "shutdown_timeout": "Raise it if handlers need longer. Keep it shorter than what your platform"
    " allows: `terminationGracePeriodSeconds` of Kubernetes is 30 s by default.",
    "stuck_after": "Set it if handlers run for long without a `process_timeout`.",
    "connect_timeout": "Lower it if `url` names several hosts, so that a frozen host is skipped"
    " sooner.",
    "publish_timeout": "Raise it for slow disks.",
    "heartbeat": "Raise it for handlers that block the event loop; lower it to notice a lost"
    " connection sooner.",
    "reconnect_delay": "Rarely.",
    "reconnect_delay_max": "Raise it for many consumers on one broker.",
    "connection_name": "Set it to recognise the consumer in RabbitMQ's management interface.",
    "ssl_cafile": "Set it if the broker's certificate is signed by your own authority.",
    "ssl_certfile": "Set it if the broker requires a client certificate.",
    "ssl_keyfile": "Set it if the key isn't in `ssl_certfile`.",
    "ssl_key_password": "Set it if the key is encrypted.",
    "wire": "`plain` if you suspect an error in the fast frame parser.",
}
"""When to change each setting."""


def page() -> str:
    """The whole page."""
    fields = BatchConsumerSettings.model_fields
    grouped = [name for names in GROUPS.values() for name in names]
    if grouped != list(fields):
        wrong = sorted(set(grouped) ^ set(fields)) or "another order than the models"
        msg = f"GROUPS must list each setting once, in the order of the models: {wrong}"
        raise SystemExit(msg)
    schema: dict[str, Any] = BatchConsumerSettings.model_json_schema()
    parts = [INTRODUCTION]
    for group, names in GROUPS.items():
        parts.append(f"## {group}\n{_note(names)}")
        parts += [_entry(name, schema) for name in names]
    return "\n".join(parts)


def _note(names: tuple[str, ...]) -> str:
    batches_only = not any(name in ConsumerSettings.model_fields for name in names)
    return "\nOnly in `BatchConsumerSettings`.\n" if batches_only else ""


def _entry(name: str, schema: dict[str, Any]) -> str:
    """A heading, which has an anchor, and what follows it."""
    field = BatchConsumerSettings.model_fields[name]
    default = "required" if field.is_required() else f"default {_shown(field.default)}"
    takes = _takes(schema["properties"][name], schema)
    return f"""\
### `{name}`

{takes[:1].upper()}{takes[1:]}; {default}

{field.description}

*When to change it:* {WHEN[name]}
"""


def _shown(value: object) -> str:
    name = getattr(value, "name", None)  # of an enum
    return f"`{name or value}`"


def _takes(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """What a value may be, in words, from its JSON schema."""
    if "$ref" in schema:
        return "`MessageResult`"
    if "anyOf" in schema:
        kinds = [_takes(each, root) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(kinds)
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "number" and "maximum" in schema:
        unit = "a share" if schema["maximum"] == 1 else "seconds"
        return f"{unit}, more than {schema['exclusiveMinimum']:g}, at most {schema['maximum']:,.0f}"
    words = {
        "string": "text",
        "boolean": "`True` or `False`",
        "array": "a list of texts",
        "object": "a dictionary",
        "integer": "a whole number",
        "number": "seconds",
    }
    return schema.get("unit", words[kind]) + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f", more than {schema['exclusiveMinimum']:g}"
    if "maximum" in schema:
        return f", {schema['minimum']} to {schema['maximum']}"
    return f", at least {schema['minimum']}" if "minimum" in schema else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
