"""Which consumer does `module:attribute` name?

An instance, a class, whose settings come from the environment then, or with `--factory` a function
that returns an instance. Whatever is wrong with it is a ConfigurationError that says what is there
instead, and where the user's own code has failed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass, isroutine
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter
from dotenv import load_dotenv

from aio_pika_batch.consumer import BaseConsumer
from aio_pika_batch.errors import AioPikaBatchError, ConfigurationError

AnyConsumer: TypeAlias = BaseConsumer[Any]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How consumers are found and configured, the same for every command."""

    factory: Annotated[bool, Parameter(negative="")] = False
    """The attribute is a function that returns a consumer; it is called without arguments."""
    app_dir: Path = Path()
    """Where to look for modules first."""
    env_file: Path | None = None
    """Variables for the environment, one NAME=value a line; what is set already is kept."""
    url: str | None = None
    """Broker, instead of the one in the settings."""


def load(target: str, loading: Loading, **settings: object) -> AnyConsumer:
    """Load one consumer.

    Args:
        target: `module:attribute`; the attribute may be dotted.
        loading: Where to look for it.
        **settings: Instead of the consumer's own; those that are None do not count.

    Raises:
        ConfigurationError: It cannot be had, or is no consumer, or is not configured well.
    """
    prepare(loading)
    name, colon, path = target.partition(":")
    module = _module(name, loading.app_dir)
    if not colon or not path:
        raise ConfigurationError(f"{target}: name a consumer in it, as {_suggestion(name, module)}")
    found = _attribute(module, path)
    consumer = _consumer(target, found, is_factory=loading.factory)
    given = {"url": loading.url, **settings}
    consumer.configure(**{key: value for key, value in given.items() if value is not None})
    return consumer


def prepare(loading: Loading) -> None:
    """Make modules and variables visible; once is enough, and again does no harm.

    Raises:
        ConfigurationError: There is no such folder, or no such file.
    """
    folder = loading.app_dir.resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"--app-dir: {loading.app_dir} is no folder")
    if str(folder) not in sys.path[:1]:
        sys.path.insert(0, str(folder))
    if loading.env_file is not None:
        if not loading.env_file.is_file():
            raise ConfigurationError(f"--env-file: there is no file {loading.env_file}")
        load_dotenv(loading.env_file)


def _module(name: str, folder: Path) -> ModuleType:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        msg = f"{name!r} is no module's name: write module:attribute, with dots and without .py"
        raise ConfigurationError(msg)
    try:
        with _blaming(name, "cannot be imported"):
            return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        msg = (
            f"{name}: there is no module {error.name!r} in {folder.resolve()}, nor is one"
            " installed; --app-dir names another folder"
        )
        raise ConfigurationError(msg) from None


def _attribute(module: ModuleType, path: str) -> object:
    found: object = module
    for part in path.split("."):
        if not hasattr(found, part):
            name = module.__name__
            close = get_close_matches(part, vars(found) if hasattr(found, "__dict__") else (), n=1)
            there = f"did you mean {close[0]!r}? " if close else ""
            msg = f"{name}:{path}: no {part!r} there; {there}{_there(name, module)}"
            raise ConfigurationError(msg)
        found = getattr(found, part)
    return found


def _consumer(target: str, found: object, *, is_factory: bool) -> AnyConsumer:
    if isinstance(found, BaseConsumer):
        if is_factory:
            raise ConfigurationError(f"{target}: is a consumer, no factory; leave out --factory")
        return found
    is_class = isclass(found) and issubclass(found, BaseConsumer)
    if isclass(found) and not is_class and not is_factory:
        raise ConfigurationError(f"{target}: is a class, but no BatchConsumer and no Consumer")
    if not is_class and not is_factory:
        hint = "; if it returns one, add --factory" if isroutine(found) else ""
        raise ConfigurationError(f"{target}: is no consumer, but {_what(found)}{hint}")
    if not callable(found):
        raise ConfigurationError(f"{target}: is no factory, but {_what(found)}")
    make: Callable[[], object] = found
    with _blaming(target, "cannot be made"):
        made = make()
    if not isinstance(made, BaseConsumer):
        if hasattr(made, "close") and hasattr(made, "__await__"):
            made.close()  # a coroutine that nobody will await
        raise ConfigurationError(f"{target}: returned no consumer, but {_what(made)}")
    return made


@contextmanager
def _blaming(target: str, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that says where it did."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{target}: {error}") from error
    except (AioPikaBatchError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and f"{target}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"{target}: {what}: {_where(error)}{error}") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise ConfigurationError(f"{target}: {what}: {_where(error)}{text}") from error


def _where(error: BaseException) -> str:
    """The last line of the user's own code that it went through."""
    if isinstance(error, SyntaxError):
        return ""  # it names its line itself
    ours = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen"))
        and "importlib" not in Path(frame.filename).parts
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def _what(found: object) -> str:
    """What something is, with its article."""
    name = type(found).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _names(module: ModuleType) -> list[str]:
    """The consumers that a module has: instances, and classes that are its own."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, BaseConsumer)
            or (
                isclass(value)
                and issubclass(value, BaseConsumer)
                and value.__module__ == module.__name__
            )
        )
    )


def _there(name: str, module: ModuleType) -> str:
    names = _names(module)
    return f"consumers in {name}: {', '.join(names)}" if names else f"{name} has no consumers"


def _suggestion(name: str, module: ModuleType) -> str:
    names = _names(module)
    if not names:
        return f"{name}:attribute (it has no consumers yet)"
    return " or ".join(f"{name}:{each}" for each in names)
