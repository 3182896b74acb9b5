"""The table of mutants is up to date: the text that each one replaces occurs once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.table import TABLE

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: mutant.trap)
def test_what_a_mutant_takes_out_is_there(mutant: Mutant) -> None:
    """And so are the tests that must notice; whether they do, `nox -s mutants` tells."""
    source = (_ROOT / "src" / "aio_pika_batch" / mutant.file).read_text()

    assert 1 == source.count(mutant.was)
    assert mutant.was != mutant.becomes
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (_ROOT / file).read_text()
