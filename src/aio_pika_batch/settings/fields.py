"""Types of settings, and explanations of invalid values.

An explanation names the field, what is allowed, and the environment variable. The value of a
secret is never shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_settings import NoDecode

from aio_pika_batch.core.message import SHORT_STRING, is_short_string
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.transport import is_known_scheme, known_schemes, scheme_of

PREFIX = "AIO_PIKA_BATCH_"
"""Of environment variables, unless a subclass has another one."""

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
    if any("\ud800" <= each <= "\udfff" for each in value):
        raise ValueError("is not valid Unicode: it has lone surrogates, which no name can have")
    if not is_short_string(value):
        raise ValueError(f"must have at most {SHORT_STRING} bytes, AMQP's limit for names and keys")
    return value


def _name(value: str) -> str:
    if "\n" in value or "\r" in value:
        raise ValueError("must not contain line breaks: RabbitMQ removes them from names")
    return _short_string(value)


_PYTHON_LIST = re.compile(r"""\[\s*(?:(?:'[^'\\]*'|"[^"\\]*")\s*(?:,\s*|(?=\])))*\]""")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_UNCLEAR = re.compile(r"""['"`;\s]|^[(\[{]|^$""")


def _one_or_several(value: object) -> object:
    """Accept `a.key`, `one,two`, `["one", "two"]` as in JSON, and `['one', 'two']` as in Python."""
    if not isinstance(value, str) or not value:
        return value
    text = value.strip()
    if text.startswith("["):
        with suppress(ValueError):
            return json.loads(text)
        if _PYTHON_LIST.fullmatch(text):
            return [one or other for one, other in _QUOTED.findall(text)]
    keys = [key.strip() for key in text.split(",")]
    for key in keys:
        if _UNCLEAR.search(key):
            msg = f'{value!r} can be read in several ways: write one,two or ["one", "two"]'
            raise ValueError(msg)
    return keys if len(keys) > 1 else text


def _known_scheme(url: str) -> str:
    scheme = scheme_of(url)
    if not is_known_scheme(scheme):
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
ExchangeName = Annotated[str, AfterValidator(_name)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_name)]
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
    fields = cls.model_fields.values()
    aliases = {each for field in fields for each in (field.alias, field.validation_alias)}
    for name in values:
        # Names with an underscore are pydantic-settings' own, such as `_env_file`.
        if name in cls.model_fields or name in aliases or name.startswith("_"):
            continue
        close = get_close_matches(name, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(f"{cls.__name__} has no setting {name!r}{hint}")


def explain(
    cls: type[BaseModel],
    error: ValidationError,
    known: Collection[str],
    *,
    given: Collection[str],
    variables: Mapping[str, str | None],
) -> str:
    """Return one line per field that says what is wrong, without the values of secrets.

    Args:
        known: Names of this library's settings. Values of a subclass's own may be secrets.
        given: Names of the values that don't come from the environment, as far as this class knows.
        variables: The environment.
    """
    prefix = str(cls.model_config.get("env_prefix", ""))
    lines = []
    for each in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in each["loc"]) or "settings"
        text = each["msg"].removeprefix("Value error, ")
        where, value = field.split(".")[0], str(each["input"])
        is_shown = where in known and where not in _SECRETS and "://" not in value
        is_shown &= each["type"] not in ("missing", "value_error")
        variable = (prefix + where).upper() if where in cls.model_fields else ""
        if where in given:
            # An application's own settings have passed it: theirs is the variable to correct.
            suffix = where.upper()
            others = (name for name in variables if name.endswith(suffix) and name != variable)
            variable = next((name for name in others if variables[name] == value), "")
        shown = f", not {each['input']!r}" if is_shown else ""
        hint = f" (in the environment: {variable})" if variable else ""
        lines.append(f"{field}: {text}{shown}{hint}")
    return f"{cls.__name__}: " + "\n  ".join(lines)


_WITHOUT_PREFIX = (
    "queue_name",
    "url",
    "exchange_name",
    "exchange_type",
    "routing_key",
    "prefetch_count",
    "num_workers",
    "batch_size",
    "batch_timeout",
    "max_requeue_attempts",
)
"""Settings of 0.1.0, which read variables without a prefix."""


def ignored_variables(
    prefix: str,
    known: Collection[str],
    variables: Mapping[str, str | None],
    *,
    given: Collection[str],
) -> list[str]:
    """Return a line for each variable that was probably meant as a setting, but isn't read.

    Args:
        known: The settings that can have a variable with this prefix.
        variables: The environment, with names in capitals.
        given: The settings that don't need a variable.
    """
    lines = []
    prefix = prefix.upper()
    is_ours = prefix == PREFIX
    for variable in sorted(each for each in variables if prefix and each.startswith(prefix)):
        name = variable.removeprefix(prefix).lower()
        # The names of the test fixtures, AIO_PIKA_BATCH_TEST_URL and so on, are not settings.
        if name in known or (is_ours and name.startswith("test_")):
            continue
        # With a prefix of its own, an application may have variables that only look similar.
        close = get_close_matches(name, known, n=1, cutoff=0.65 if is_ours else 0.9)
        if close:
            lines.append(f"{variable} is not a setting: did you mean {prefix}{close[0].upper()}?")
    for name in _WITHOUT_PREFIX if is_ours else ():
        value = variables.get(name.upper())
        if value and name not in given and prefix + name.upper() not in variables:
            if name == "url" and not is_known_scheme(scheme_of(value)):
                continue
            lines.append(
                f"{name.upper()} is not read: settings need their prefix, {prefix}{name.upper()}"
            )
    # Only the URL: other settings with our own prefix are likely those of another consumer.
    if not is_ours and "url" not in given and prefix + "URL" not in variables:
        ours = f"{PREFIX}URL"
        if ours in variables:
            lines.append(f"{ours} is not read: these settings have another prefix, {prefix}URL")
    return lines
