"""librabbitmq, the client in C: what is possible. A program of ours, built on the spot.

Needs a C compiler and ``librabbitmq-dev`` (Debian's name). It prints its own answer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.protocol import Job

SOURCE = Path(__file__).with_suffix(".c")
PROGRAM = Path(__file__).resolve().parents[2] / ".cache" / "bench" / "librabbitmq"


def build() -> None:
    """Compile, unless it is done."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("there is no C compiler")
    command = [compiler, "-O2", "-Wall", "-o", str(PROGRAM), str(SOURCE), "-lrabbitmq"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  -- made here
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        sys.exit(f"cannot be built, is librabbitmq-dev installed? {first}")


def run(job: Job) -> None:
    """Become the program."""
    build()
    url = urlsplit(job.url)
    numbers = (url.port, job.prefetch, job.batch, job.warmup, job.messages)
    os.execv(PROGRAM, [str(PROGRAM), str(url.hostname), job.queue, *map(str, numbers)])  # noqa: S606  -- no shell is the point


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
