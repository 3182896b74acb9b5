"""Tests of the command line itself: help, exit codes, and what a process is started with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aio_pika_batch import cli
from aio_pika_batch.cli.app import Exit, exit_code, exit_code_of_all, print_error, run_app
from aio_pika_batch.cli.process_manager import describe_exit
from aio_pika_batch.cli.targets import TargetOptions
from aio_pika_batch.cli.worker_process import ProcessOptions
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    DrainIncomplete,
    TopologyError,
)


def test_help_imports_no_client_and_no_consumer():
    """Nor pydantic: it must be quick."""
    story = (
        "import sys\n"
        "from aio_pika_batch.cli.app import run_app\n"
        "assert 0 == run_app(['--help'])\n"
        "print('IMPORTED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", story], check=True, capture_output=True, text=True)
    imported = set(done.stdout.partition("IMPORTED")[2].split())
    assert set() == imported & {"aio_pika", "aiormq", "pamqp", "pydantic", "prometheus_client"}


def test_without_the_extra_an_error_names_the_command_to_install_it(monkeypatch, capsys):
    """On one line, with exit code 2."""
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "cyclopts" else object())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert 2 == ended.value.code
    errors = capsys.readouterr().err
    assert "cyclopts not found" in errors
    assert "pip install 'aio-pika-batch[cli]'" in errors


def test_version_is_printed(capsys):
    """The installed one."""
    assert 0 == run_app(["--version"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), 2),
        (TopologyError("x"), 2),
        (BrokerUnavailable("x"), 3),
        (AccessRefused("x"), 3),
        (DrainIncomplete("x"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
)
def test_exit_code_tells_configuration_connection_and_crash_apart(error, code):
    """2, 3 and 1."""
    assert code == exit_code(error)


def test_exit_code_of_several_errors_is_that_of_a_crash_if_there_was_one():
    """A restart may help after a crash. Without errors it is 0."""
    several = [AccessRefused("x"), ConfigurationError("x")]
    assert Exit.USAGE is exit_code_of_all(several)
    assert Exit.FAILED is exit_code_of_all([*several, RuntimeError()])
    assert Exit.OK is exit_code_of_all([])


def test_process_options_survive_json(tmp_path):
    """All of them arrive in the other process."""
    options = ProcessOptions(
        targets=("shop:a", "shop:b"),
        loading=TargetOptions(
            app_dir=tmp_path, env_file=tmp_path / ".env", factory=True, url="memory://"
        ),
        workers=3,
        drain_timeout=1.5,
        log_level="debug",
        log_format="json",
        loop="asyncio",
        has_metrics=True,
    )
    assert options == ProcessOptions.from_json(options.to_json())
    assert ProcessOptions(targets=("shop:a",)) == ProcessOptions.from_json(
        ProcessOptions(targets=("shop:a",)).to_json()
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "with exit code 0"), (7, "with exit code 7"), (-9, "by SIGKILL"), (-99, "by signal 99")],
)
def test_describe_exit_names_the_code_or_the_signal(code, words):
    """Also a signal without a name."""
    assert words == describe_exit(code)


def test_an_error_is_printed_without_control_characters(capsys):
    """It may contain the broker's words; its line breaks stay."""
    print_error("first\x1b[31m\nsecond")
    assert "aio-pika-batch: first\\x1b[31m\nsecond\n" == capsys.readouterr().err
