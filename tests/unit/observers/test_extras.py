"""What does somebody see who has not installed what an observer needs?"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("prometheus", "prometheus_client", "prometheus"), ("otel", "opentelemetry", "otel")],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch, module, package, extra
):
    """At the import; nothing else of the library needs it."""
    name = f"aio_pika_batch.observers.{module}"
    for each in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'aio-pika-batch\[{extra}\]'"):
        importlib.import_module(name)


def test_the_front_door_imports_neither():
    """Nor does anything that is imported by it: an observer is imported by its module's name."""
    story = (
        "import sys, aio_pika_batch.consumer, aio_pika_batch.observers\n"
        "assert not {'prometheus_client', 'opentelemetry', 'structlog'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", story], check=True)
