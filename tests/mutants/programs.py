"""Mutants of what users' programs meet: classes, settings, signals, bodies."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CLASSES = "tests/unit/shell/test_consumer_classes.py"
_SIGNALS = "tests/unit/shell/test_signals.py"
_INSIDE = "tests/unit/shell/test_inside_other_programs.py"
_ENVIRONMENT = "tests/unit/test_settings_environment.py"

_LOGGING = "tests/unit/shell/test_logging.py"
_CHECKS = "tests/unit/core/test_config_checks.py"

PROGRAMS = (
    Mutant(
        "A terminal shows nothing when a consumer starts.",
        "runtime/worker_pool.py",
        "            self._on_running()\n",
        "            pass\n",
        (_LOGGING,),
    ),
    Mutant(
        "The line for terminals is written into files, too.",
        "logs.py",
        "            if sys.stderr.isatty():\n",
        "            if True:\n",
        (_LOGGING,),
    ),
    Mutant(
        "Where logging isn't configured, a warning doesn't show that it is one.",
        "logs.py",
        "            if not self._logger.hasHandlers():\n",
        "            if False:\n",
        (_LOGGING,),
    ),
    Mutant(
        "A consumer with default settings warns of a classic queue.",
        "core/config_checks.py",
        "    if _is_classic_by_default(options, profile):\n        return []\n",
        "",
        (_LOGGING, _CHECKS),
    ),
    Mutant(
        "aiormq logs each failed attempt to connect.",
        "adapters/aio_pika/connection.py",
        "        _is_ours.set(True)",
        "        _is_ours.set(False)",
        ("tests/unit/adapters/aio_pika/test_connection.py",),
    ),
    Mutant(
        "aiormq's lines about other connections of the program are dropped.",
        "adapters/aio_pika/connection.py",
        "not (_is_ours.get() and str",
        "not (str",
        ("tests/unit/adapters/aio_pika/test_connection.py",),
    ),
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
        "self._process(collector.given)",
        "self._process(tuple(collector.given))",
        (_CLASSES,),
    ),
    Mutant(
        "A handler that returns a list makes its messages fail, again and again.",
        "runtime/handler.py",
        "is_mistake = not self.works and isinstance(error, HandlerMistake)",
        "is_mistake = False",
        (_CLASSES,),
    ),
    Mutant(
        "One message without a result ends a consumer that has worked for weeks.",
        "runtime/handler.py",
        "            self._check.works = True\n",
        "            pass\n",
        (_CLASSES,),
    ),
    Mutant(
        "A handler that sorts its list in place acknowledges the wrong messages.",
        "core/batch_run.py",
        "        if is_changed and self._by_position:\n",
        "        if False:\n",
        (_CLASSES,),
    ),
    Mutant(
        "`run` ends well although the handler can't work.",
        "runtime/lifecycle.py",
        "return pool.mistake or incomplete",
        "return incomplete",
        (_CLASSES,),
    ),
    Mutant(
        "A handler with wrong parameters is found out by its first batch.",
        "consumer.py",
        "        signature.bind(None)\n",
        "        pass\n",
        (_CLASSES,),
    ),
    Mutant(
        "Routing keys that can't be read are bound as one key, and no message comes.",
        "settings/fields.py",
        "        if _UNCLEAR.search(key):\n",
        "        if False:\n",
        (_ENVIRONMENT,),
    ),
    Mutant(
        "A misspelt variable is ignored in silence.",
        "settings/fields.py",
        '        if close:\n            lines.append(f"{variable} is',
        '        if False:\n            lines.append(f"{variable} is',
        (_ENVIRONMENT,),
    ),
    Mutant(
        "An application's settings show the password of the broker in an error.",
        "settings/consumer_settings.py",
        "        if not ours:\n            raise\n",
        "        if True:\n            raise\n",
        (_ENVIRONMENT,),
    ),
    Mutant(
        "An error about an application's settings names a variable that nobody has set.",
        "settings/fields.py",
        "        if where in given:\n",
        "        if False:\n",
        (_ENVIRONMENT,),
    ),
    Mutant(
        "A second URL in a subclass of settings is shown with its password.",
        "settings/consumer_settings.py",
        'yield name, mask_url(str(value)) if "://" in str(value) else value',
        "yield name, value",
        (_ENVIRONMENT,),
    ),
    Mutant(
        "heartbeat=0 in a URL switches heartbeats off.",
        "adapters/aio_pika/url.py",
        "not 1 <= int(heartbeat[:9])",
        "not 0 <= int(heartbeat[:9])",
        ("tests/unit/adapters/aio_pika/test_url.py",),
    ),
    Mutant(
        "A virtual host named `..` is another one.",
        "adapters/aio_pika/connection.py",
        "encoded=True)",
        "encoded=False)",
        ("tests/unit/adapters/aio_pika/test_url.py",),
    ),
    Mutant(
        "A virtual host whose name the client library changes is accepted.",
        "adapters/aio_pika/url.py",
        '    if "%2F" in vhost:\n',
        "    if False:\n",
        ("tests/unit/adapters/aio_pika/test_url.py",),
    ),
    Mutant(
        "An answer by direct reply-to is returned before RabbitMQ 4, although it was delivered.",
        "core/publication.py",
        "not is_reply)",
        "True)",
        ("tests/unit/core/test_publication.py",),
    ),
    Mutant(
        "A small compressed body fills the memory.",
        "core/content_encoding.py",
        "        if left < 0:\n",
        "        if False:\n",
        ("tests/unit/core/test_message.py",),
    ),
    Mutant(
        "A body that was cut off is decoded as far as it goes.",
        "core/content_encoding.py",
        '        if not decompressor.eof:\n            raise ValueError("the body is incomplete")\n'
        "        parts",
        "        parts",
        ("tests/unit/core/test_message.py",),
    ),
    Mutant(
        "Only the first member of a gzip body is decoded.",
        "core/content_encoding.py",
        "        body = decompressor.unused_data\n",
        '        body = b""\n',
        ("tests/unit/core/test_message.py",),
    ),
    Mutant(
        "The encodings are undone in the wrong order.",
        "core/content_encoding.py",
        'for each in reversed((content_encoding or "").split(",")):',
        'for each in (content_encoding or "").split(","):',
        ("tests/unit/core/test_message.py",),
    ),
    Mutant(
        "A web server in whose lifespan a consumer runs never gets its SIGTERM.",
        "runtime/shutdown.py",
        "                        handler(number, None)\n",
        "                        pass\n",
        (_SIGNALS,),
    ),
    Mutant(
        "Ctrl-C ends a graceful shutdown with a KeyboardInterrupt.",
        "runtime/shutdown.py",
        "            and not isinstance(runner, asyncio.Runner)\n",
        "",
        (_SIGNALS,),
    ),
    Mutant(
        "A consumer that ends takes away the signal handlers of a server that started after it.",
        "runtime/shutdown.py",
        "if signal.getsignal(number) == self._on_signal:",
        "if True:",
        (_SIGNALS,),
    ),
    Mutant(
        "A forked child drains instead of ending.",
        "runtime/shutdown.py",
        "            self._listeners.clear()\n            self._restore()\n",
        "            pass\n",
        (_SIGNALS,),
    ),
    Mutant(
        "A web application doesn't come up without its broker.",
        "consumer.py",
        "await self._start(_PATIENCE)",
        "await self._start(None)",
        (_INSIDE,),
    ),
    Mutant(
        "A refusal of the broker ends a worker in the background, and nobody notices.",
        "runtime/worker_pool.py",
        "worker.raises_refusals = False",
        "pass",
        (_INSIDE,),
    ),
    Mutant(
        "Another thread stops a consumer on the wrong event loop.",
        "runtime/lifecycle.py",
        "            loop.call_soon_threadsafe(self.request_stop)\n            return\n",
        "            pass\n",
        (_INSIDE,),
    ),
)
