"""Runs the fuzzers: ``python -m tests.fuzz [--count N] [--seed N] [TARGET …]``, or `nox -s fuzz`.

Inputs are numbered. ``--first NUMBER --count 1`` runs a single one.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import traceback
from random import Random

from tests.fuzz.targets import TARGETS

_MEMORY = 512 * 2**20
"""Bytes that a run may need beyond what it starts with; a claimed length that is believed needs
more."""
_GROWTH = 64 * 2**20
"""Bytes by which a run may have grown at its end."""
_FINDINGS = 5


def fuzz(target: str, seed: int, first: int, count: int) -> int:
    """Run inputs one after another; return how many broke a promise."""
    found = 0
    step = max(count // 10, 1)
    began, before = time.monotonic(), _resident()
    for number in range(first, first + count):
        try:
            TARGETS[target](Random(seed << 40 | number))
        except Exception:  # noqa: BLE001  -- each is a finding
            found += 1
            print(f"\n{target}: input {number} of seed {seed}:\n{traceback.format_exc()}")
            if found == _FINDINGS:
                print("enough")
                break
        if (number - first + 1) % step == 0:
            seconds = time.monotonic() - began
            print(f"{target}: {number - first + 1:,} inputs, {seconds:.0f} s", flush=True)
    growth = _resident() - before
    print(f"{target}: {found} findings; grew by {growth / 2**20:.1f} MiB at its peak")
    if growth > _GROWTH:
        print(f"{target}: that is too much")
        found += 1
    return found


def _resident() -> int:
    """The most memory that this process has used, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _limit_memory() -> None:
    """Let allocations fail that are much larger than the input."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:  # noqa: PTH123  -- no file of anybody's
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--count", type=int, default=200_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    _limit_memory()
    return sum(
        fuzz(target, arguments.seed, arguments.first, arguments.count)
        for target in arguments.targets or TARGETS
    )


if __name__ == "__main__":
    sys.exit(min(main(), 1))
