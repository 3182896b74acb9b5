"""Mutants of what users' programs meet: classes, settings, signals, bodies."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CLASSES = "tests/unit/shell/test_consumer_classes.py"

PROGRAMS = (
    Mutant(
        "`BatchConsumer[MySettings]` reads the settings of the base class from the environment.",
        "consumer.py",
        "cls.settings_class = each",
        "pass",
        (_CLASSES,),
    ),
    Mutant(
        "A dict in place of settings fails somewhere inside.",
        "consumer.py",
        "        if isinstance(settings, wanted):\n",
        "        if True:\n",
        (_CLASSES,),
    ),
    Mutant(
        "A batch, or a part of it that is run again, isn't a list.",
        "runtime/handler.py",
        "self._process(list(collector.messages))",
        "self._process(tuple(collector.messages))",
        (_CLASSES,),
    ),
)
