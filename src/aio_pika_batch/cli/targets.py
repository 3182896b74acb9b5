"""Loads the consumer that `module:attribute` names, and finds its dead-letter queue.

The attribute is an instance, a class whose settings come from the environment, or with `--factory`
a function that returns an instance. A wrong target is a `ConfigurationError` that says what was
found instead, and at which line the user's code failed.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass, isroutine
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from cyclopts import Parameter
from dotenv import load_dotenv

from aio_pika_batch.cli.app import Flag
from aio_pika_batch.cli.logging import silence_clients
from aio_pika_batch.consumer import BaseConsumer, Consumer
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.errors import AioPikaBatchError, ConfigurationError
from aio_pika_batch.settings import ConsumerSettings
from aio_pika_batch.transport import Transport

AnyConsumer: TypeAlias = BaseConsumer[Any]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Options for finding a consumer, the same for every command."""

    factory: Flag = False
    """The target is a function that returns a consumer."""
    app_dir: Path = Path()
    """Folder to import modules from."""
    env_file: Path | None = None
    """File of environment variables, one NAME=value per line; set variables are kept."""
    url: str | None = None
    """Broker URL; replaces the one in the settings."""


def load(target: str, loading: TargetOptions, **settings: object) -> AnyConsumer:
    """Load one consumer.

    Args:
        target: `module:attribute`; the attribute may be dotted.
        loading: Where to find it.
        **settings: Replace the consumer's own settings; None keeps a setting.

    Raises:
        ConfigurationError: It can't be loaded, isn't a consumer, or its settings are invalid.
    """
    prepare(loading)
    name, colon, path = target.partition(":")
    module = _module(name, loading.app_dir)
    if not colon or not path:
        raise ConfigurationError(f"{target}: add the consumer's name: {_suggestion(name, module)}")
    found = _attribute(module, path)
    consumer = _consumer(target, found, is_factory=loading.factory)
    given = {"url": loading.url, **settings}
    consumer.configure(**{key: value for key, value in given.items() if value is not None})
    return consumer


def prepare(loading: TargetOptions) -> None:
    """Add the folder to the import path and the file to the environment.

    Raises:
        ConfigurationError: The folder or the file doesn't exist.
    """
    folder = loading.app_dir.resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"--app-dir: {loading.app_dir} is not a folder")
    # Before installed packages, none of which should hide a module of the user. Behind the standard
    # library, whose modules a json.py in that folder should not replace everywhere.
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    library |= {os.path.join(each, "lib-dynload") for each in library}  # noqa: PTH118  -- as in sys.path
    position = 1 + max((at for at, each in enumerate(sys.path) if each in library), default=-1)
    if str(folder) not in sys.path[: position + 1]:
        sys.path.insert(position, str(folder))
    if loading.env_file is not None:
        if not loading.env_file.is_file():
            raise ConfigurationError(f"--env-file: {loading.env_file} does not exist")
        load_dotenv(loading.env_file)


def _module(name: str, folder: Path) -> ModuleType:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        msg = f"{name!r} is not a module name: write module:attribute, with dots and without .py"
        raise ConfigurationError(msg)
    try:
        with _locate_errors(name, "cannot be imported"):
            return import_module(name)
    except ModuleNotFoundError as error:
        # The target itself is missing. `_locate_errors` reports a module that the target imports.
        msg = (
            f"{name}: there is no module {error.name!r} in {folder.resolve()}, and none is"
            " installed; use --app-dir to name its folder"
        )
        raise ConfigurationError(msg) from None


def _attribute(module: ModuleType, path: str) -> object:
    found: object = module
    for part in path.split("."):
        if not hasattr(found, part):
            name = module.__name__
            close = get_close_matches(part, vars(found) if hasattr(found, "__dict__") else (), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            msg = f"{name}:{path}: there is no {part!r}; {hint}{_list_consumers(name, module)}"
            raise ConfigurationError(msg)
        found = getattr(found, part)
    return found


def _consumer(target: str, found: object, *, is_factory: bool) -> AnyConsumer:
    if isinstance(found, BaseConsumer):
        if is_factory:
            raise ConfigurationError(f"{target}: is a consumer, not a factory; leave out --factory")
        return found
    is_class = isclass(found) and issubclass(found, BaseConsumer)
    if isclass(found) and not is_class and not is_factory:
        raise ConfigurationError(f"{target}: is a class, but not a BatchConsumer or Consumer")
    if not is_class and not is_factory:
        hint = "; if it returns one, add --factory" if isroutine(found) else ""
        raise ConfigurationError(f"{target}: is {_type_of(found)}, not a consumer{hint}")
    if not callable(found):
        raise ConfigurationError(f"{target}: is {_type_of(found)}, not a factory")
    make: Callable[[], object] = found
    with _locate_errors(target, "cannot be created", hint=_instance_of(found)):
        made = make()
    if not isinstance(made, BaseConsumer):
        if hasattr(made, "close") and hasattr(made, "__await__"):
            made.close()  # a coroutine that is never awaited would warn
        raise ConfigurationError(f"{target}: returned {_type_of(made)}, not a consumer")
    return made


def _instance_of(target: object) -> str:
    """Return a hint at an instance in the module of a class, which has settings of its own."""
    module = str(getattr(target, "__module__", ""))
    found = vars(sys.modules[module]) if module in sys.modules else {}
    names = [name for name, each in found.items() if type(each) is target]
    return f"; {module}:{names[0]} is a consumer of this class that has settings" if names else ""


@contextmanager
def _locate_errors(target: str, what: str, *, hint: str = "") -> Iterator[None]:
    """Turn an error of the user's code into one line that says where it was raised.

    Args:
        hint: Added to errors in the configuration.
    """
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{target}: {error}{hint}") from error
    except (AioPikaBatchError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and f"{target}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"{target}: {what}: {_location(error)}{error}") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if "asyncio.run() cannot be called" in text:
            text += (
                "; the module runs its consumer when it is imported: put that line under"
                ' `if __name__ == "__main__":`'
            )
        raise ConfigurationError(f"{target}: {what}: {_location(error)}{text}") from error


def _location(error: BaseException) -> str:
    """Return the last line of the user's code in the traceback."""
    if isinstance(error, SyntaxError):
        return ""  # its text names the line
    ours = str(Path(__file__).parents[1])
    # The user cares for the last line of their own code, not for those of importlib or of this
    # library that called it.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen"))
        and "importlib" not in Path(frame.filename).parts
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def _type_of(found: object) -> str:
    """Return the type of a value, with its article."""
    name = type(found).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _names(module: ModuleType) -> list[str]:
    """Return the names of a module's consumers: instances, and classes that it defines."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, BaseConsumer)
            # A class that was imported from elsewhere isn't meant to be run.
            or (
                isclass(value)
                and issubclass(value, BaseConsumer)
                and value.__module__ == module.__name__
            )
        )
    )


def _list_consumers(name: str, module: ModuleType) -> str:
    names = _names(module)
    return f"consumers in {name}: {', '.join(names)}" if names else f"{name} has no consumers"


def _suggestion(name: str, module: ModuleType) -> str:
    names = _names(module)
    if not names:
        return f"{name}:attribute (the module has no consumers yet)"
    return " or ".join(f"{name}:{each}" for each in names)


# --- dead-letter queues ----------------------------------------------------------


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """Options for the dead-letter queue."""

    queue: str | None = None
    """Dead-letter queue, if no consumer is given or its settings don't name one."""
    delivery_limit: int | None = None
    """Delivery limit of the queue, if a policy sets it; -1 for none."""


class _NoConsumer(Consumer):
    """Stands in for the consumer of a queue that `--queue` names."""

    async def process_message(self, message: Message) -> MessageResult:
        """Never called."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DeadLetterQueue:
    """A dead-letter queue and how to reach it.

    Attributes:
        how: More arguments for the functions of `aio_pika_batch.dead_letters`.
    """

    transport: Transport
    queue: str
    how: dict[str, Any]


def find_queue(
    target: str | None, place: QueueOptions | None, loading: TargetOptions | None
) -> DeadLetterQueue:
    """Return the queue of a consumer or the named one. Raises ConfigurationError."""
    silence_clients()
    place, loading = place or QueueOptions(), loading or TargetOptions()
    if target is not None:
        consumer: Any = load(target, loading)
        queue = place.queue or consumer.settings.dead_letter_queue
        if queue is None:
            raise ConfigurationError(
                f"{target}: its settings have no dead_letter_queue; name the queue with --queue"
            )
    elif place.queue is not None:
        prepare(loading)
        queue = place.queue
        # A consumer all the same: its settings bring the broker's URL and TLS from the environment.
        given = {} if loading.url is None else {"url": loading.url}
        consumer = _NoConsumer(ConsumerSettings(queue_name=queue, **given))
    else:
        raise ConfigurationError("name a consumer as module:attribute, or a queue with --queue")
    how: dict[str, Any] = {"retry_count_header": consumer.settings.retry_count_header}
    if place.delivery_limit is not None:
        how["delivery_limit"] = place.delivery_limit
    return DeadLetterQueue(consumer._transport, queue, how)  # noqa: SLF001  -- same package
