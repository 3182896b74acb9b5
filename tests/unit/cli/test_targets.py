"""Tests of loading a consumer by `module:attribute`, and of the errors for a wrong target."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from aio_pika_batch import ConfigurationError
from aio_pika_batch.cli.app import run_app
from aio_pika_batch.cli.targets import TargetOptions, load

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
def shop(tmp_path, monkeypatch) -> TargetOptions:
    """A folder with modules of consumers, and some that fail."""
    modules = {
        "shop": SHOP,
        "broken": "x = 1\n1 / 0\n",
        "running": "import asyncio\nasyncio.run(asyncio.sleep(0))\n",
        "lacking": "import no_such_module\n",
        "unparsable": "def f(:\n",
        "empty": "",
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield TargetOptions(app_dir=tmp_path)
    for name in modules:
        sys.modules.pop(name, None)


def test_the_target_may_be_an_instance(shop):
    """Also a dotted attribute."""
    assert "orders" == load("shop:importer", shop).settings.queue_name
    assert "corner" == load("shop:Corner.importer", shop).settings.queue_name


def test_a_class_takes_its_settings_from_the_environment(shop, monkeypatch):
    """It is called without arguments."""
    monkeypatch.setenv("AIO_PIKA_BATCH_QUEUE_NAME", "refunds")
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", "memory://")
    assert "refunds" == load("shop:Importer", shop).settings.queue_name


def test_a_factory_is_called(shop):
    """With --factory."""
    made = load("shop:make", TargetOptions(app_dir=shop.app_dir, factory=True))
    assert "orders" == made.settings.queue_name


def test_an_env_file_adds_variables_and_keeps_those_that_are_set(shop, monkeypatch):
    """A variable in the environment takes precedence."""
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", "memory://mine")
    monkeypatch.delenv("AIO_PIKA_BATCH_QUEUE_NAME", raising=False)
    file = shop.app_dir / "production.env"
    file.write_text("AIO_PIKA_BATCH_QUEUE_NAME=filed\nAIO_PIKA_BATCH_URL=memory://filed\n")
    made = load("shop:Importer", TargetOptions(app_dir=shop.app_dir, env_file=file))
    assert ("filed", "memory://mine") == (made.settings.queue_name, made.settings.url)


def test_options_replace_settings(shop):
    """None keeps a setting, and so do settings without an option."""
    made = load(
        "shop:importer",
        TargetOptions(app_dir=shop.app_dir, url="memory://other"),
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
    ("target", "expected"),
    [
        ("no_such:Importer", "no module 'no_such' in"),
        ("shop", "shop:Importer or shop:importer"),
        ("empty", "the module has no consumers yet"),
        ("shop:", "shop:Importer or shop:importer"),
        ("shop:Importr", "did you mean 'Importer'? consumers in shop: Importer, importer"),
        ("shop:Corner.office", "there is no 'office'"),
        ("shop:make", "is a function, not a consumer; if it returns one, add --factory"),
        ("shop:number", "is an int, not a consumer"),
        ("shop:Corner", "is a class, but not a BatchConsumer or Consumer"),
        ("broken:x", "broken.py:2: ZeroDivisionError: division by zero"),
        ("running:importer", 'put that line under `if __name__ == "__main__":`'),
        ("lacking:x", "lacking.py:1: No module named 'no_such_module'"),
        ("unparsable:x", "unparsable.py, line 1"),
        ("shop.py:importer", "'shop.py' is not a module name"),
        ("./shop:importer", "'./shop' is not a module name"),
        (":importer", "'' is not a module name"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine 'sleep' was never awaited")
def test_a_wrong_target_is_an_error_on_one_line(shop, capsys, target, expected):
    """It says what is wrong, where, and what was found instead; the exit code is 2."""
    assert 2 == run_app(["run", target, "--app-dir", str(shop.app_dir)])
    captured = capsys.readouterr()
    assert "" == captured.out
    assert expected in captured.err
    assert 1 == captured.err.count("\n")
    # What a broken module has left behind must not complain in another test.
    gc.collect()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("shop:make_later", "returned a coroutine, not a consumer"),
        ("shop:fail", "RuntimeError: the shop is closed"),
        ("shop:number", "is an int, not a factory"),
        ("shop:importer", "is a consumer, not a factory"),
    ],
)
def test_a_wrong_factory_is_an_error(shop, target, expected):
    """Also one that raises."""
    with pytest.raises(ConfigurationError, match=expected):
        load(target, TargetOptions(app_dir=shop.app_dir, factory=True))


def test_an_invalid_setting_is_reported_with_its_variable(shop, monkeypatch, capsys):
    """The error says what to set."""
    monkeypatch.delenv("AIO_PIKA_BATCH_QUEUE_NAME", raising=False)
    monkeypatch.chdir(shop.app_dir)  # away from any .env
    assert 2 == run_app(["run", "shop:Importer"])
    errors = capsys.readouterr().err
    assert "AIO_PIKA_BATCH_QUEUE_NAME" in errors
    assert "shop:importer is a consumer of this class that has settings" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
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
def test_wrong_usage_exits_with_2_and_no_traceback(shop, monkeypatch, capsys, arguments, expected):
    """Wrong options and wrong settings alike."""
    monkeypatch.chdir(shop.app_dir)
    assert 2 == run_app(arguments)
    errors = capsys.readouterr().err
    assert expected in errors
    assert "Traceback" not in errors


def test_a_folder_is_added_to_the_import_path_once(shop):
    """However many consumers are loaded from it."""
    load("shop:importer", shop)
    load("shop:make", TargetOptions(app_dir=shop.app_dir, factory=True))
    assert 1 == sys.path.count(str(Path(shop.app_dir).resolve()))


def test_a_folder_of_the_user_does_not_replace_the_standard_library(tmp_path):
    """But it comes before installed packages."""
    for name in ("statistics", "shelve", "hypothesis"):
        (tmp_path / f"{name}.py").write_text("")
    program = (
        "import sys; from pathlib import Path;"
        "from aio_pika_batch.cli.targets import TargetOptions, prepare;"
        "prepare(TargetOptions(app_dir=Path(sys.argv[1])));"
        "import shelve, statistics, hypothesis;"
        "[print(Path(each.__file__).parent) for each in (shelve, statistics, hypothesis)]"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    library = sysconfig.get_path("stdlib")
    assert [library, library, str(tmp_path)] == shown
