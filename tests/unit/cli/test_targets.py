"""Which consumer does `module:attribute` name, and what is said where it names none?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from aio_pika_batch import ConfigurationError
from aio_pika_batch.cli.app import run_app
from aio_pika_batch.cli.targets import Loading, load

SHOP = """
from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult

class Importer(BatchConsumer):
    async def process_messages(self, messages):
        for message in messages:
            yield MessageResult.ACK

class Corner:
    importer = Importer(BatchConsumerSettings(queue_name="corner", url="memory://"))

importer = Importer(BatchConsumerSettings(queue_name="orders", url="memory://"))

def make():
    return importer

async def make_later():
    return importer

def fail():
    raise RuntimeError("the shop is closed")

number = 7
"""


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Loading:
    """A folder with modules that name consumers, and some that fail."""
    modules = {
        "shop": SHOP,
        "broken": "x = 1\n1 / 0\n",
        "lacking": "import no_such_module\n",
        "unparsable": "def f(:\n",
        "empty": "",
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield Loading(app_dir=tmp_path)
    for name in modules:
        sys.modules.pop(name, None)


def test_an_instance_is_taken_as_it_is(shop):
    """Dotted attributes are followed."""
    assert "orders" == load("shop:importer", shop).settings.queue_name
    assert "corner" == load("shop:Corner.importer", shop).settings.queue_name


def test_a_class_takes_its_settings_from_the_environment(shop, monkeypatch):
    """As everywhere else."""
    monkeypatch.setenv("AIO_PIKA_BATCH_QUEUE_NAME", "refunds")
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", "memory://")
    assert "refunds" == load("shop:Importer", shop).settings.queue_name


def test_a_factory_is_called(shop):
    """With --factory only."""
    made = load("shop:make", Loading(app_dir=shop.app_dir, factory=True))
    assert "orders" == made.settings.queue_name


def test_an_env_file_fills_the_environment_and_replaces_nothing(shop, monkeypatch):
    """What is set already was set by somebody who knew."""
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", "memory://mine")
    monkeypatch.delenv("AIO_PIKA_BATCH_QUEUE_NAME", raising=False)
    file = shop.app_dir / "production.env"
    file.write_text("AIO_PIKA_BATCH_QUEUE_NAME=filed\nAIO_PIKA_BATCH_URL=memory://filed\n")
    made = load("shop:Importer", Loading(app_dir=shop.app_dir, env_file=file))
    assert ("filed", "memory://mine") == (made.settings.queue_name, made.settings.url)


def test_what_is_given_replaces_settings_and_the_rest_stays(shop):
    """Whether they came from code or from the environment; None is nothing."""
    made = load(
        "shop:importer",
        Loading(app_dir=shop.app_dir, url="memory://other"),
        num_workers=3,
        shutdown_timeout=None,
    )
    settings = made.settings
    assert ("orders", 3, 25.0) == (
        settings.queue_name,
        settings.num_workers,
        settings.shutdown_timeout,
    )
    assert "memory://other" == settings.url


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such:Importer", "no module 'no_such' in"),
        ("shop", "as shop:Importer or shop:importer"),
        ("empty", "it has no consumers yet"),
        ("shop:", "as shop:Importer or shop:importer"),
        ("shop:Importr", "did you mean 'Importer'? consumers in shop: Importer, importer"),
        ("shop:Corner.office", "no 'office' there"),
        ("shop:make", "is no consumer, but a function; if it returns one, add --factory"),
        ("shop:number", "is no consumer, but an int"),
        ("shop:Corner", "is a class, but no BatchConsumer and no Consumer"),
        ("broken:x", "broken.py:2: ZeroDivisionError: division by zero"),
        ("lacking:x", "lacking.py:1: No module named 'no_such_module'"),
        ("unparsable:x", "unparsable.py, line 1"),
        ("shop.py:importer", "'shop.py' is no module's name"),
        ("./shop:importer", "'./shop' is no module's name"),
        (":importer", "'' is no module's name"),
    ],
)
def test_a_wrong_target_is_told_in_one_line_and_ends_with_2(shop, capsys, target, said):
    """What is wrong, where, and what is there instead."""
    assert 2 == run_app(["run", target, "--app-dir", str(shop.app_dir)])
    told = capsys.readouterr()
    assert "" == told.out
    assert said in told.err
    assert 1 == told.err.count("\n")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("shop:make_later", "returned no consumer, but a coroutine"),
        ("shop:fail", "RuntimeError: the shop is closed"),
        ("shop:number", "is no factory, but an int"),
        ("shop:importer", "is a consumer, no factory"),
    ],
)
def test_a_wrong_factory_is_told_too(shop, target, said):
    """Also one that fails."""
    with pytest.raises(ConfigurationError, match=said):
        load(target, Loading(app_dir=shop.app_dir, factory=True))


def test_a_wrong_setting_is_told_with_its_variable(shop, monkeypatch, capsys):
    """Where to mend it."""
    monkeypatch.delenv("AIO_PIKA_BATCH_QUEUE_NAME", raising=False)
    monkeypatch.chdir(shop.app_dir)  # away from any .env
    assert 2 == run_app(["run", "shop:Importer"])
    assert "AIO_PIKA_BATCH_QUEUE_NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "TARGET"),
        (["run", "shop:importer", "--workers", "many"], "--workers"),
        (["run", "shop:importer", "--workers", "0"], "num_workers"),
        (["run", "shop:importer", "--wrkers", "2"], "--wrkers"),
        (["run", "shop:importer", "--url", "smtp://host"], "smtp:// is not one of"),
        (["run", "shop:importer", "--env-file", "missing.env"], "missing.env"),
        (["run", "shop:importer", "--app-dir", "nowhere"], "nowhere"),
        (["rnu"], "rnu"),
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(shop, monkeypatch, capsys, arguments, said):
    """Whoever is to mend it: the one who types, or the one who configures."""
    monkeypatch.chdir(shop.app_dir)
    assert 2 == run_app(arguments)
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_folders_are_looked_into_once(shop):
    """However many consumers are loaded."""
    load("shop:importer", shop)
    load("shop:make", Loading(app_dir=shop.app_dir, factory=True))
    assert 1 == sys.path.count(str(Path(shop.app_dir).resolve()))
