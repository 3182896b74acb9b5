"""Installs the competitors from the package index, each into an environment of its own.

The environments are below ``.cache/bench`` and use the same Python, so that only the code differs.
Thus clients may need different versions of the same package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "bench"

MAIN = "main"
REQUIREMENTS: dict[str, list[str]] = {
    MAIN: [str(ROOT), "pika", "amqp", "uvloop"],
    "amqp10": ["rabbitmq-amqp-python-client"],
    "faststream": ["faststream[rabbit]"],
    "celery": ["celery", "celery-batches"],
    "original": ["aio-pika-batch==0.1.0"],
}
"""What each environment is made of: current releases, but for the one that is history."""


class EnvironmentFailed(Exception):
    """An environment could not be made. The message contains the output."""


def python(name: str) -> Path:
    """Return the interpreter of an environment, which need not exist."""
    return FOLDER / name / "bin" / "python"


def make(name: str, interpreter: str, *, anew: bool = False) -> None:
    """Make an environment, unless it exists and has the right packages.

    Raises:
        EnvironmentFailed: The interpreter, or the installation of a package, failed.
    """
    folder = FOLDER / name
    stamp = folder / "made-of.json"
    wanted = json.dumps([interpreter, REQUIREMENTS[name]])
    if not anew and stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"making the environment {name!r}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([interpreter, "-m", "venv", str(folder)])
    _install(name, "--upgrade", "--upgrade-strategy", "eager", *REQUIREMENTS[name])
    stamp.write_text(wanted)


def take_ourselves() -> None:
    """Install this library as it is now. What is edited later is not measured.

    Raises:
        EnvironmentFailed: It can't be built.
    """
    _install(MAIN, "--no-deps", "--force-reinstall", str(ROOT))


def best_interpreter() -> str:
    """Return Python 3.12, which all competitors can use, or else the running one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = sorted(pyenv.glob("3.12*/bin/python3.12"))
    # A shim of pyenv's on PATH fails unless it is enabled, so it is asked first what it is.
    for candidate in (*map(str, found), shutil.which("python3.12")):
        if candidate and _answers(candidate):
            return candidate
    return sys.executable


def _install(name: str, *arguments: str) -> None:
    pip = [str(python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *arguments])


def _answers(candidate: str) -> bool:
    done = subprocess.run([candidate, "-V"], capture_output=True, check=False)  # noqa: S603  -- found here
    return done.returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  -- made here
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise EnvironmentFailed(" · ".join(line for line in said[-3:] if line.strip()))
