"""How is a front door quick to open? What is behind it is imported when it is first asked for.

A test runner opens ours in every project that has this library installed, to find its plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module


def lazy_exports(
    package: str, names: Sequence[str], rooms: Sequence[str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: Its `__name__`.
        names: Its `__all__`.
        rooms: Its modules in which they are, looked into in this order.
    """

    def find(name: str) -> object:
        if name in names:
            for room in rooms:
                module = import_module(f"{package}.{room}")
                if hasattr(module, name):
                    found: object = getattr(module, name)
                    # Asked for once: from now on it is there.
                    setattr(sys.modules[package], name, found)
                    return found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return find, listing
