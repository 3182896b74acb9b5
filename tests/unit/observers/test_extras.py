"""Tests of observers whose package isn't installed."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("prometheus", "prometheus_client", "prometheus"), ("otel", "opentelemetry", "otel")],
)
def test_the_error_for_a_missing_package_names_the_extra(monkeypatch, module, package, extra):
    """It is raised when the observer's module is imported."""
    name = f"aio_pika_batch.observers.{module}"
    for each in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, each)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'aio-pika-batch\[{extra}\]'"):
        importlib.import_module(name)


def test_the_package_imports_no_observer():
    """An observer is imported from its module only."""
    story = (
        "import sys, aio_pika_batch.consumer, aio_pika_batch.observers\n"
        "assert not {'prometheus_client', 'opentelemetry', 'structlog'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", story], check=True)
