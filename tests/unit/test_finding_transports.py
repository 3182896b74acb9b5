"""Which transport serves a URL, and the errors if none does."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from aio_pika_batch import ConfigurationError, ConsumerSettings, transport
from aio_pika_batch.adapters.memory import MemoryTransport
from aio_pika_batch.transport import GROUP, Endpoint, known_schemes, open_transport, scheme_of

URL = "plug://user:secret@host/"


def plugged(monkeypatch, value, name="plug"):
    """Register a transport as an installed package does."""

    def offered(*, group, **wanted):
        assert group == GROUP
        return EntryPoints([EntryPoint(name, value, GROUP)]).select(**wanted)

    monkeypatch.setattr(transport, "entry_points", offered)


def test_the_built_in_transports_are_known():
    """Without importing one."""
    assert {"amqp", "amqps", "memory"} <= set(known_schemes())
    assert sorted(known_schemes()) == known_schemes()


def test_the_scheme_selects_the_transport():
    """In upper or lower case."""
    assert isinstance(open_transport(Endpoint(url="memory://")), MemoryTransport)
    assert isinstance(open_transport(Endpoint(url="MEMORY://name")), MemoryTransport)


def test_an_installed_package_can_serve_another_scheme(monkeypatch):
    """By an entry point, which gets the whole endpoint."""
    plugged(monkeypatch, f"{__name__}:Plug")
    assert "plug" in known_schemes()
    assert URL == open_transport(Endpoint(url=URL)).endpoint.url


class Plug:
    """The transport of an installed package."""

    def __init__(self, endpoint):
        self.endpoint = endpoint


def test_a_package_cannot_replace_a_built_in_transport(monkeypatch):
    """By registering the same scheme."""
    plugged(monkeypatch, f"{__name__}:Plug", name="memory")
    assert isinstance(open_transport(Endpoint(url="memory://")), MemoryTransport)


@pytest.mark.parametrize("url", ["plug://user:secret@host/", "nothing", "", "://"])
def test_the_error_for_an_unknown_scheme_lists_the_known_ones(url):
    """And does not show the rest of the URL."""
    with pytest.raises(ConfigurationError, match="use one of amqp, amqps, memory") as raised:
        open_transport(Endpoint(url=url))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("value", ["no_such_package:factory", f"{__name__}:no_such_name"])
def test_the_error_for_a_failed_import_says_what_is_missing(monkeypatch, value):
    """And what to do about it."""
    plugged(monkeypatch, value)
    with pytest.raises(
        ConfigurationError, match=r"url: .*plug://.*no_such_(package|name).*install what it needs"
    ) as raised:
        open_transport(Endpoint(url=URL))
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is not None


# --- with distributions as pip installs them -------------------------------------------


def installed(folder: Path, name: str, source: str, scheme: str = "plug") -> None:
    """Install a package with an entry point into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{scheme} = {name}:open_transport\n")


PLUG = """
class Plug:
    def __init__(self, endpoint):
        self.endpoint = endpoint

open_transport = Plug
"""


def test_an_installed_distribution_is_found(tmp_path, monkeypatch):
    """By its metadata. It is imported only for such a URL."""
    installed(tmp_path, "plug_found", PLUG)
    monkeypatch.syspath_prepend(tmp_path)

    assert "plug" in known_schemes()
    assert URL == ConsumerSettings(queue_name="q", url=URL).url
    assert "plug_found" not in sys.modules
    transport = open_transport(Endpoint(url=URL))
    assert ("plug_found", URL) == (type(transport).__module__, transport.endpoint.url)


def test_the_error_of_a_broken_distribution_names_it(tmp_path, monkeypatch):
    """Whatever it raises, and without the rest of the URL."""
    installed(tmp_path, "plug_without", "import no_such_client")
    installed(tmp_path, "plug_broken", "raise RuntimeError('needs a newer kernel')", "plug2")
    monkeypatch.syspath_prepend(tmp_path)

    for url, says in {
        URL: "plug_without:open_transport of plug_without, .*no_such_client.*install what it needs",
        URL.replace("plug", "plug2"): "of plug_broken, RuntimeError: needs a newer kernel",
    }.items():
        with pytest.raises(ConfigurationError, match=says) as raised:
            open_transport(Endpoint(url=url))
        assert "secret" not in str(raised.value)


def test_two_distributions_for_one_scheme_are_an_error(tmp_path, monkeypatch):
    """Their order on the path must not decide."""
    installed(tmp_path, "plug_one", PLUG)
    installed(tmp_path, "plug_two", PLUG)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigurationError, match="plug:// is served by") as raised:
        open_transport(Endpoint(url=URL))
    said = str(raised.value)
    assert "plug_one:open_transport of plug_one" in said
    assert "plug_two:open_transport of plug_two" in said
    assert "uninstall all but one, or pass the transport in" in said
    assert "secret" not in said


def test_a_distribution_that_is_found_twice_counts_once(tmp_path, monkeypatch):
    """With an editable and an ordinary installation."""
    for folder in ("here", "there"):
        installed(tmp_path / folder, "plug_twice", PLUG)
        monkeypatch.syspath_prepend(tmp_path / folder)

    assert "plug_twice" == type(open_transport(Endpoint(url=URL))).__module__


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("amqp://h", "amqp"),
        (" AMQPS://h", "amqps"),
        ("x-my.scheme+tls://h", "x-my.scheme+tls"),
        ("amqp:/h", ""),
        ("user:se://cret@host", ""),
        ("://h", ""),
        ("1st://h", ""),
    ],
)
def test_the_scheme_of_a_url(url, scheme):
    """If it is valid by RFC 3986. Otherwise it may be a part of a password."""
    assert scheme == scheme_of(url)
