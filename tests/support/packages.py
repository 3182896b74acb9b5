"""Installs servers by the machine's package manager, without starting them as services."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Each user has one: Linux may forbid all others, even root, to open such a file in /tmp.
_LOCK = Path(tempfile.gettempdir(), f"aio-pika-batch-installs-{os.getuid()}.lock")


class InstallError(Exception):
    """A package manager failed; the report has its output."""


def install_commands(package: str, *, brew: str, dnf: str | None = None) -> list[list[str]] | None:
    """Return how this machine's package manager installs a server; None if there is no way.

    Args:
        package: Its name in Debian, of the package and of the service.
        brew: Its name in Homebrew.
        dnf: Its name in Fedora, if that is another.
    """
    if shutil.which("brew"):
        return [["brew", "install", brew]]  # as oneself; brew refuses root
    rights = _rights()
    if rights is None:
        return None
    if shutil.which("apt-get"):
        # Debian starts what it installs, and that would take a port and outlive the tests. No
        # service is started in runlevel 1, nor, under systemd, one that is masked.
        apt = [*rights, "env", "RUNLEVEL=1", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        mask = [*rights, "systemctl", "mask", "--runtime", package]
        return [
            *([mask] if Path("/run/systemd/system").is_dir() else []),
            [*apt, "update"],
            [*apt, "install", "-y", "--no-install-recommends", package],
        ]
    if shutil.which("dnf"):
        return [[*rights, "dnf", "install", "-y", dnf or package]]
    return None


def install_and_find(commands: list[list[str]], look: Callable[[], T | None], what: str) -> T:
    """Install, and return what *look* then finds; raise ``InstallError`` if that is None.

    Only one installation runs at a time on this machine, since package managers lock each other
    out. Another test run may have installed the same meanwhile.
    """
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = look()
        if found is None:
            install(commands)
            found = look()
    if found is None:
        raise InstallError(f"`{' '.join(commands[-1])}` went well, but brought no {what}")
    return found


def install(commands: list[list[str]]) -> None:
    """Run the commands; raise ``InstallError`` at the first that fails."""
    for command in commands:
        print("$", *command, flush=True)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise InstallError(f"`{' '.join(command)}` failed; this report has its output")


def _rights() -> list[str] | None:
    """Return the prefix that runs a command as root, or None if that is not allowed."""
    if os.geteuid() == 0:
        return []
    asks = ["sudo", "--non-interactive"]
    if shutil.which("sudo") and subprocess.run([*asks, "true"], check=False).returncode == 0:
        return asks
    return None
