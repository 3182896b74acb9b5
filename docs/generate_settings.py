"""Write the reference of all settings from the models, so that it cannot say anything else.

`python docs/generate_settings.py` writes `docs/settings.md`; a unit test says when that is due.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aio_pika_batch import BatchConsumerSettings, ConsumerSettings

PAGE = Path(__file__).with_name("settings.md")

INTRODUCTION = """\
# Settings

<!-- Written by docs/generate_settings.py: change the models, or the script, and run it. -->

`ConsumerSettings` and `BatchConsumerSettings` take their values from code, then from the
environment, then from a file `.env`. A variable is the setting's name in capitals behind a
prefix: `AIO_PIKA_BATCH_QUEUE_NAME`. A subclass chooses its own prefix:

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

A subclass can have settings of its own. Name it as the parameter of your consumer's class: then
type checkers know `self.settings`, and `Importer()` reads all of them from the environment.

<!-- test: environment MY_APP_QUEUE_NAME=orders MY_APP_DATABASE=postgresql:///shop -->
```python
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult


class MySettings(BatchConsumerSettings):
    model_config = SettingsConfigDict(env_prefix="MY_APP_")

    database: str


class Importer(BatchConsumer[MySettings]):
    async def process_messages(self, messages):
        print("to", self.settings.database)
        for _ in messages:
            yield MessageResult.ACK


print(Importer().settings.database)
```
<!-- test: prints postgresql:///shop -->

Dictionaries are written as JSON. Several routing keys are separated by commas, or written as a
list, such as `orders.#,refunds` or `["orders.#", "refunds"]`. A key that contains a comma, a space
or a quote needs the list.

An invalid value is refused when the settings are made, with a
[`ConfigurationError`](errors.md#configurationerror) that names the setting. So is an unknown name
in code. A variable with the prefix that isn't a setting is ignored; if it looks like one, a warning
and `aio-pika-batch check` say which one was probably meant. Times are in seconds. Passwords are
masked wherever settings are shown.
"""

TUNING = """\
## What usually needs changing

- **`batch_size` and `batch_timeout`.** A batch is handed over when it is full, or when its first
  message has waited for `batch_timeout`. The timeout is the price that a quiet queue pays; a busy
  one never meets it.
- **`prefetch_count`: usually not.** Left unset it is computed so that a full batch can be
  collected while others are handled: `max(10, batch_size × (concurrency + 1))`, per worker. Set
  below `batch_size` it limits the batches; a warning at start says so.
- **`concurrency` or `num_workers`.** `concurrency` runs several batches at once on one
  connection. `num_workers` opens further connections: one more than your event loop can keep busy
  gains nothing.
- **`dead_letter_queue`.** Set it: messages that fail for good end there. Without it they are
  retried with growing delays, and messages that get NACK are discarded.
- **`requeue_delay`: usually not.** By default the consumer holds a failed message for 1, 2, 4, … s,
  at most 30 s, before it is retried. Set it if retries should wait in queues of their own, so that
  they take up no prefetch; see [Guarantees](guarantees.md#retries-that-wait).
- **`settle`.** `"yield"` for handlers that take long, message by message: a crash then repeats a
  moment's work and not a batch. `"atomic"` for handlers that yield inside a transaction. See [When
  results are settled](how-it-works.md#when-results-are-settled).
- **`isolate_failures`.** For handlers that write their batch in one go: one bad row then costs one
  message. See [One bad row](how-it-works.md#one-bad-row).
- **`process_timeout`.** None by default. RabbitMQ itself takes messages back after 30 minutes
  (its `consumer_timeout`), so a handler that may hang wants one.
- **`shutdown_timeout`.** Shorter than what your platform gives a process before it kills it:
  Kubernetes' `terminationGracePeriodSeconds` is 30 by default.
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
        rows = "\n".join(_row(name, schema) for name in names)
        parts.append(
            f"## {group}\n{_note(names)}\n"
            f"| setting | takes | default | |\n| --- | --- | --- | --- |\n{rows}\n"
        )
    parts.append(TUNING)
    return "\n".join(parts)


def _note(names: tuple[str, ...]) -> str:
    batches_only = not any(name in ConsumerSettings.model_fields for name in names)
    return "\nOf `BatchConsumerSettings` only.\n" if batches_only else ""


def _row(name: str, schema: dict[str, Any]) -> str:
    field = BatchConsumerSettings.model_fields[name]
    default = "required" if field.is_required() else _shown(field.default)
    takes = _takes(schema["properties"][name], schema)
    return f"| `{name}` | {takes} | {default} | {field.description} |"


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
        return f"{unit}, more than {schema['exclusiveMinimum']:g}, at most {schema['maximum']:g}"
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
