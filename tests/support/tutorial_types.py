"""Checks the files of docs/tutorial.md with `mypy --strict` and with pyright's strict mode.

Run it with ``python -m tests.support.tutorial_types``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.integration.test_tutorial import steps


def files() -> dict[str, str]:
    """The files as they are at the end of the page."""
    found: dict[str, str] = {}
    for kind, name, text in steps():
        if kind == "file":
            before = found.get(name, "")
            added = text.removeprefix(before)
            if name == "shop.py" and before:
                # Its new end replaces the settings.
                before = before[: before.index("SETTINGS = ")]
            found[name] = before + added
    return found


def main() -> int:
    """Return the exit code of the first checker that finds errors, or 0."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files().items():
            Path(folder, name).write_text(text)
        configuration = {"typeCheckingMode": "strict", "pythonVersion": "3.11"}
        Path(folder, "pyrightconfig.json").write_text(json.dumps(configuration))
        mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "."]
        pyright = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
        for command in (mypy, pyright):
            done = subprocess.run(command, cwd=folder, check=False)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
