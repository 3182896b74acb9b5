"""Types of settings, and explanations of invalid values.

An explanation names the field, what is allowed, and the environment variable. The value of a
secret is never shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import NoDecode

from aio_pika_batch.core.message import SHORT_STRING, is_short_string
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.transport import known_schemes, scheme_of

_MILLISECOND = 0.001

_SECRETS = frozenset(("url", "ssl_key_password"))
"""Values of these settings are never shown."""

_EXCHANGE_TYPES = ("direct", "fanout", "topic", "headers")


def plain_value(value: object) -> object:
    """Accept `aio_pika.ExchangeType.FANOUT` for `"fanout"`."""
    return value.value if isinstance(value, Enum) else value


def result_by_name(value: object) -> object:
    """Accept `REQUEUE` or `requeue`, as the environment has it."""
    if isinstance(value, str):
        try:
            return MessageResult[value.strip().upper()]
        except KeyError:
            names = ", ".join(result.name for result in MessageResult)
            raise ValueError(f"{value!r} is not a MessageResult: use one of {names}") from None
    return value


def _short_string(value: str) -> str:
    if not is_short_string(value):
        raise ValueError(f"must have at most {SHORT_STRING} bytes, AMQP's limit for names and keys")
    return value


def _one_or_several(value: object) -> object:
    """Accept `a.key`, whatever it would be in JSON, or `["several", "keys"]`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def _known_scheme(url: str) -> str:
    scheme = scheme_of(url)
    if scheme not in known_schemes():
        known = ", ".join(f"{each}://" for each in known_schemes())
        found = (
            f"{scheme}:// is not one of {known}" if scheme else f"it must start with one of {known}"
        )
        raise ValueError(found)
    return url


def _known_exchange_type(value: str) -> str:
    if value not in _EXCHANGE_TYPES and not value.startswith("x-"):
        raise ValueError(f"{value!r} is not one of {', '.join(_EXCHANGE_TYPES)}, or a plugin's x-…")
    return value


def _never_ack(value: MessageResult) -> MessageResult:
    if value is MessageResult.ACK:
        raise ValueError(
            "ACK would remove messages that were not handled; use REQUEUE, NACK or"
            " REQUEUE_IMMEDIATE, or map the exceptions that mean success by exception_results"
        )
    return value


def _whole_milliseconds(value: float) -> float:
    if 0 < value < _MILLISECOND:
        raise ValueError(f"must be 0, or at least {_MILLISECOND}: brokers count milliseconds")
    return value


ShortString = Annotated[str, AfterValidator(_short_string)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_short_string)]
Keys = Annotated[ShortString | list[ShortString] | None, NoDecode, BeforeValidator(_one_or_several)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False, json_schema_extra={"unit": "a number"})]
Pause = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_whole_milliseconds)]
Url = Annotated[str, AfterValidator(_known_scheme)]
ExchangeType = Annotated[str, BeforeValidator(plain_value), AfterValidator(_known_exchange_type)]
FailureAction = Annotated[
    MessageResult, BeforeValidator(result_by_name), AfterValidator(_never_ack)
]
Count = Annotated[int, Field(ge=1)]
Arguments = dict[str, Any] | None


def refuse_unknown(cls: type[BaseModel], values: Mapping[str, object]) -> None:
    """Raise ConfigurationError for a name that isn't a setting, with the most similar one."""
    for name in values:
        # Names with an underscore are pydantic-settings' own, such as `_env_file`.
        if name in cls.model_fields or name.startswith("_"):
            continue
        close = get_close_matches(name, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(f"{cls.__name__} has no setting {name!r}{hint}")


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Return one line per field that says what is wrong, without the values of secrets."""
    prefix = str(cls.model_config.get("env_prefix", ""))
    lines = []
    for each in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in each["loc"]) or "settings"
        text = each["msg"].removeprefix("Value error, ")
        where = field.split(".")[0]
        said = each["type"] in ("missing", "value_error") or where in _SECRETS
        given = "" if said else f", not {each['input']!r}"
        variable = (
            f" (in the environment: {(prefix + where).upper()})"
            if where in cls.model_fields
            else ""
        )
        lines.append(f"{field}: {text}{given}{variable}")
    return f"{cls.__name__}: " + "\n  ".join(lines)
