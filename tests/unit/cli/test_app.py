"""Is the command line quick to answer, and does it say what is missing?"""

from __future__ import annotations

import subprocess
import sys

import pytest

from aio_pika_batch import cli
from aio_pika_batch.cli.app import run_app
from aio_pika_batch.cli.exits import Exit, exit_of, exit_of_all
from aio_pika_batch.cli.options import Work
from aio_pika_batch.cli.supervisor import _how
from aio_pika_batch.cli.targets import Loading
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    DrainIncomplete,
    TopologyError,
)


def test_help_imports_no_client_and_no_consumer():
    """Nor what settings are made of: it has to be quick."""
    story = (
        "import sys\n"
        "from aio_pika_batch.cli.app import run_app\n"
        "assert 0 == run_app(['--help'])\n"
        "print('IMPORTED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", story], check=True, capture_output=True, text=True)
    imported = set(done.stdout.partition("IMPORTED")[2].split())
    assert set() == imported & {"aio_pika", "aiormq", "pamqp", "pydantic", "prometheus_client"}


def test_without_its_extra_it_says_what_to_install(monkeypatch, capsys):
    """In a line, with exit code 2."""
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "cyclopts" else object())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert 2 == ended.value.code
    told = capsys.readouterr().err
    assert "cyclopts not found" in told
    assert "pip install 'aio-pika-batch[cli]'" in told


def test_the_version_is_told(capsys):
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
def test_the_exit_code_says_whose_fault_it_was(error, code):
    """The world's, the configuration's, or the code's."""
    assert code == exit_of(error)


def test_of_several_errors_a_crash_counts_most():
    """A restart might help then; of none at all, all went well."""
    several = [AccessRefused("x"), ConfigurationError("x")]
    assert Exit.USAGE is exit_of_all(several)
    assert Exit.FAILED is exit_of_all([*several, RuntimeError()])
    assert Exit.OK is exit_of_all([])


def test_work_survives_its_way_to_another_process(tmp_path):
    """With everything that was asked for."""
    work = Work(
        targets=("shop:a", "shop:b"),
        loading=Loading(
            app_dir=tmp_path, env_file=tmp_path / ".env", factory=True, url="memory://"
        ),
        workers=3,
        drain_timeout=1.5,
        log_level="debug",
        log_format="json",
        loop="asyncio",
        has_metrics=True,
    )
    assert work == Work.from_json(work.to_json())
    assert Work(targets=("shop:a",)) == Work.from_json(Work(targets=("shop:a",)).to_json())


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "with exit code 0"), (7, "with exit code 7"), (-9, "by SIGKILL"), (-99, "by signal 99")],
)
def test_an_exit_code_is_told_in_words(code, words):
    """Also that of a signal without a name."""
    assert words == _how(code)
