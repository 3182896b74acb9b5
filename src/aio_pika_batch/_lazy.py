"""Imports a package's public names when they are first used (PEP 562).

Test runners import this package in every project that has it installed, because it contains a
plugin. Importing everything at once would cost each of them a tenth of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    Args:
        package: Its `__name__`.
        modules: The module of each public name, relative to the package.
    """

    def get(name: str) -> object:
        if name == "__version__":
            # Importing this, and reading the metadata, costs milliseconds.
            from importlib.metadata import version

            return version(package.replace("_", "-"))
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found: object = getattr(import_module(f"{package}.{modules[name]}"), name)
        # Next time it is found without this function.
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
