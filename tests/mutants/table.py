"""The table of all mutants.

Each entry takes out a line that prevents a bug, and names the tests of which one must then fail.
The replaced text must occur in its file exactly once, so that an outdated entry is detected.
"""

from __future__ import annotations

from tests.mutants.amqp10 import AMQP10
from tests.mutants.exactly_once import EXACTLY_ONCE
from tests.mutants.flow import FLOW
from tests.mutants.mutant import Mutant
from tests.mutants.native import NATIVE
from tests.mutants.programs import PROGRAMS

_UNIT = "tests/unit/adapters/aio_pika"
_SESSION = "tests/integration/test_aio_pika_session.py"
_PUBLISHER = "tests/integration/test_aio_pika_publisher.py"
_TOPOLOGY = "tests/integration/test_aio_pika_topology.py"
_WIRE = "adapters/aio_pika"

WIRE = (
    Mutant(
        "A multiple ack ends on a tag that is settled differently: the broker closes the channel.",
        "core/settlement.py",
        "Frame(disposition, same[-1], len(same) > 1)",
        "Frame(disposition, members[-1], len(same) > 1)",
        ("tests/unit/core/test_ledger.py",),
    ),
    Mutant(
        "The multiple ack is sent before the rejects, and includes their tags.",
        "core/settlement.py",
        "return [Frame(decided[tag], tag) for tag in sorted(singles)] + multiples",
        "return multiples + [Frame(decided[tag], tag) for tag in sorted(singles)]",
        ("tests/unit/core/test_ledger.py", "tests/unit/core/test_ledger_machine.py"),
    ),
    Mutant(
        "A frame is written on a closed channel: the broker closes the connection.",
        f"{_WIRE}/frame_tap.py",
        "if self.end is not None or not self._parser.is_tapping:",
        "if self.end is not None:",
        (f"{_SESSION}::test_a_closed_channel_ends_the_session_with_the_brokers_reason",),
    ),
    Mutant(
        "A channel is still tapped after the broker closed it, although its number is reused.",
        f"{_WIRE}/frame_parser.py",
        "            self.untap()\n            self._events.append(ChannelClosed(",
        "            self._events.append(ChannelClosed(",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "A channel is still tapped after a regular close, although its number is reused.",
        f"{_WIRE}/frame_parser.py",
        "            self.untap()\n            self._events.append(ChannelCloseOk())",
        "            self._events.append(ChannelCloseOk())",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "Half a message of a closed channel is kept, and mixed with the next message.",
        f"{_WIRE}/frame_parser.py",
        "self._deliveries = self._confirms = self._content = self._guard = None",
        "self._deliveries = self._confirms = self._guard = None",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "A cancel by the broker goes unnoticed.",
        f"{_WIRE}/frame_parser.py",
        "elif method == BASIC_CANCEL and not (deliveries is None and self._guard is None):",
        "elif method == BASIC_CANCEL and deliveries is None:",
        (f"{_UNIT}/test_frame_parser.py", f"{_SESSION}::test_a_deleted_queue_ends_the_session"),
    ),
    Mutant(
        "The client library gets no heartbeats on a busy connection, and closes it.",
        f"{_WIRE}/frame_tap.py",
        "self._reader.feed_data(HEARTBEAT_FRAME)",
        "pass",
        (f"{_SESSION}::test_a_busy_connection_is_not_considered_dead",),
    ),
    Mutant(
        "Only the client library notices a silent peer, and late.",
        f"{_WIRE}/frame_tap.py",
        "_SILENT_HEARTBEATS = 3",
        "_SILENT_HEARTBEATS = 30",
        (f"{_SESSION}::test_a_silent_broker_ends_the_session",),
    ),
    Mutant(
        "A protocol header in place of a frame is not recognized.",
        f"{_WIRE}/frame_parser.py",
        "if data.startswith(PROTOCOL_HEADER):",
        "if False:",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "An outgoing frame is larger than the negotiated maximum.",
        f"{_WIRE}/frame_fastpath.py",
        "largest = frame_max - FRAME_OVERHEAD",
        "largest = frame_max",
        (f"{_UNIT}/test_frame_packing.py",),
    ),
    Mutant(
        "An incoming frame may have any size: its sender decides about our memory.",
        f"{_WIRE}/frame_parser.py",
        "        if size > self._largest:\n",
        "        if False:\n",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "A body in several frames counts as complete after the first.",
        f"{_WIRE}/frame_parser.py",
        "        content.missing -= size\n",
        "        content.missing = 0\n",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "A cancel counts as confirmed before its answer has come.",
        f"{_WIRE}/session.py",
        "            await channel.cancel()\n        self._is_drained = True",
        "            self._is_drained = True\n            await channel.cancel()",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "Messages that come after the loss of a session are handed out, and delivered again.",
        "adapters/buffered_session.py",
        "        if self._loss is not None:\n            return\n",
        "",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "An exception of a listener drops the other frames of the same read.",
        f"{_WIRE}/frame_tap.py",
        "except Exception as error:  # noqa: BLE001  -- the rest of the read must not be lost",
        "except KeyError as error:",
        (f"{_UNIT}/test_frame_tap.py",),
    ),
    Mutant(
        "The socket stays open after bytes that are not AMQP.",
        f"{_WIRE}/frame_tap.py",
        "                    self._reader.set_exception(AMQPConnectionError(event.reason))\n"
        "                    self.abort()\n",
        "                    self._reader.set_exception(AMQPConnectionError(event.reason))\n",
        (f"{_UNIT}/test_frame_tap.py",),
    ),
    Mutant(
        "An OSError while connecting is not translated.",
        f"{_WIRE}/frame_tap.py",
        "        except OSError as error:\n",
        "        except ZeroDivisionError as error:\n",
        (f"{_UNIT}/test_frame_tap.py",),
    ),
    Mutant(
        "A frame is written after the client library has closed the connection.",
        f"{_WIRE}/frame_tap.py",
        "if writer is None or writer.is_closing():",
        "if writer is None:",
        (f"{_UNIT}/test_frame_tap.py",),
    ),
    Mutant(
        "An error while draining a lost connection is not translated.",
        f"{_WIRE}/session.py",
        '            with lost_on_error("the connection broke"):\n',
        "            if True:\n",
        (f"{_UNIT}/test_frame_tap.py",),
    ),
    Mutant(
        "A property of a wrong type is sent, because an equal one was encoded before.",
        f"{_WIRE}/properties.py",
        "@lru_cache(maxsize=256, typed=True)",
        "@lru_cache(maxsize=256)",
        (f"{_UNIT}/test_properties.py",),
    ),
    Mutant(
        "A property that cannot be decoded affects other messages.",
        f"{_WIRE}/properties.py",
        "            except UnicodeDecodeError as error:\n                undecodable[name] = f",
        "            except ZeroDivisionError as error:\n                undecodable[name] = f",
        (f"{_UNIT}/test_properties.py",),
    ),
    Mutant(
        "A return is matched with the first publication of its route.",
        f"{_WIRE}/confirms.py",
        "if call.properties[index] == returned.properties and call.bodies[index] == returned.body:",
        "if True:",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "A return whose headers the broker has reordered is not matched.",
        f"{_WIRE}/confirms.py",
        "call.bodies[index] == returned.body and decode(call.properties[index]) == properties:",
        "call.bodies[index] == returned.body and call.properties[index] == properties:",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "A return that matches nothing is dropped: a lost message counts as confirmed.",
        f"{_WIRE}/confirms.py",
        "    return list(route)\n",
        "    return []\n",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "Confirms are assumed to come in order.",
        f"{_WIRE}/confirms.py",
        "        else:\n            self.settle(confirm.tag, outcome)\n",
        "        self.settle(confirm.tag, outcome)\n        self._oldest = confirm.tag + 1\n",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "A confirm of a part of what was sent together settles all of it.",
        f"{_WIRE}/confirms.py",
        "min(group.stop, end), group.offset",
        "group.stop, group.offset",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "The outcome of a copy that can't be sent is another one's.",
        f"{_WIRE}/confirms.py",
        "found.insert(index, Outcome.UNPUBLISHABLE)",
        "found.append(Outcome.UNPUBLISHABLE)",
        (_PUBLISHER,),
    ),
    Mutant(
        "A late confirm after a timeout counts for the next publication.",
        f"{_WIRE}/publisher.py",
        "accept no more.\n                self._is_open = False\n",
        "accept no more.\n                pass\n",
        (f"{_PUBLISHER}::test_silence_makes_the_outcome_unknown",),
    ),
    Mutant(
        "A header is added although it exists already.",
        f"{_WIRE}/properties.py",
        "if changes.names.isdisjoint(copy.message.headers):",
        "if copy.message.headers is not None:",
        (f"{_UNIT}/test_splice.py",),
    ),
    Mutant(
        "A key inside another header's value counts as the header itself.",
        f"{_WIRE}/properties.py",
        "            if key not in changes.keys:\n",
        "            if not any(each in raw[entry:value_end] for each in changes.keys):\n",
        (f"{_UNIT}/test_splice.py",),
    ),
    Mutant(
        "A header that the broker cannot decode is sent: it closes the connection.",
        f"{_WIRE}/properties.py",
        "            check_value(raw, value, value_end)\n",
        "",
        (f"{_UNIT}/test_splice.py",),
    ),
    Mutant(
        "A copy keeps another user's user_id: the broker closes the channel.",
        f"{_WIRE}/properties.py",
        'case "user_id" if raw[start + 1 : end] != user:',
        'case "user_id" if raw[start + 1 : end] == user:',
        (f"{_UNIT}/test_splice.py",),
    ),
    Mutant(
        "A double is written as a float.",
        f"{_WIRE}/tables.py",
        '_TYPED_DOUBLE = struct.Struct(">Bd")',
        '_TYPED_DOUBLE = struct.Struct(">Bf")',
        (f"{_UNIT}/test_tables.py",),
    ),
    Mutant(
        "The channel of a broker that isn't RabbitMQ is closed right behind the last settlement.",
        f"{_WIRE}/session.py",
        "SETTLE_PAUSE = 0.2",
        "SETTLE_PAUSE = 0.0",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "What is settled before the answer to a cancel is not counted with the rest.",
        f"{_WIRE}/session.py",
        "            writer.hold()\n",
        "",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "Messages that arrive just before the answer to a cancel are not counted.",
        f"{_WIRE}/session.py",
        "else len(ledger) + len(self._pending)",
        "else len(ledger)",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "A paused session is closed although the queue has not answered since many settlements.",
        f"{_WIRE}/session.py",
        "                await channel.resume(1)\n",
        "                pass\n",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "A channel is closed before a quorum queue has carried out the last settlements.",
        f"{_WIRE}/session.py",
        "if self._asks_queue and self._writer.unproven and await self._channel.has_leader():",
        "if False:",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "A commit on a quorum queue proves its settlements, although the channel may keep them.",
        f"{_WIRE}/session.py",
        "            if self._commits_prove:\n",
        "            if True:\n",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "Only the first wait for settlements waits.",
        f"{_WIRE}/session.py",
        "        self._confirming = self._in_own_task(",
        "        self._confirming = self._confirming or self._in_own_task(",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "A stop hangs in a question to a queue without a leader.",
        f"{_WIRE}/session.py",
        " and await self._channel.has_leader():",
        ":",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "A message that is delivered for the last answer gets before those that a stop returns.",
        f"{_WIRE}/session.py",
        "            self._returns = {}\n        match",
        "            pass\n        match",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "What a quorum queue delivers for its last answer is returned by the close, and counted.",
        f"{_WIRE}/session.py",
        "            untaken = self._pending\n",
        "            pass\n",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "Settlements are not sorted: a commit needs a command for nearly each of them.",
        "core/settlement.py",
        "key=lambda tag: (order.index(held[tag]), tag)",
        "key=lambda tag: tag",
        (f"{_UNIT}/test_session.py", "tests/unit/core/test_ledger_machine.py"),
    ),
    Mutant(
        "Each result of a long drain is committed at once: a quorum queue drops the last ones.",
        "core/settlement.py",
        "if self._spent + commands > SAFE_COMMANDS - len(Disposition):",
        "if False:",
        ("tests/unit/core/test_drain_budget.py",),
    ),
    Mutant(
        "Nothing is left of the budget for the last commit.",
        "core/settlement.py",
        "if self._spent + commands > SAFE_COMMANDS - len(Disposition):",
        "if self._spent + commands > SAFE_COMMANDS:",
        ("tests/unit/core/test_drain_budget.py",),
    ),
    Mutant(
        "The last settlements of a drain are not committed before the close.",
        f"{_WIRE}/session.py",
        "            await self._commit()\n        else:",
        "            pass\n        else:",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "A broker that isn't RabbitMQ gets transactions, which may end the connection.",
        "core/settlement.py",
        "return DrainMode.COMMITTED if is_rabbitmq else DrainMode.JOINED",
        "return DrainMode.COMMITTED",
        (f"{_UNIT}/test_session.py", "tests/unit/core/test_drain_budget.py"),
    ),
    Mutant(
        "Settlements count as unproven although the channel was closed in an orderly way.",
        f"{_WIRE}/session.py",
        "                self._writer.on_channel_closed()\n",
        "                pass\n",
        (f"{_UNIT}/test_session.py",),
    ),
    Mutant(
        "An aiormq that opens the socket itself is used without the tap.",
        f"{_WIRE}/connection.py",
        "if has_ended and failure is None and tap.is_installed:",
        "if has_ended and failure is None:",
        (f"{_UNIT}/test_connection.py",),
    ),
    Mutant(
        "TLS is used without the verifying context.",
        f"{_WIRE}/frame_tap.py",
        'await provider.get_context() if url.scheme == "amqps" else None',
        "None",
        (f"{_TOPOLOGY}::test_tls",),
    ),
)

SECURITY = (
    Mutant(
        "Any value of no_verify_ssl except 0 disables verification, even false.",
        "adapters/url.py",
        'if options.get("no_verify_ssl", "0") not in {"0", "1"}:',
        "if False:",
        ("tests/unit/adapters/test_tls.py",),
    ),
    Mutant(
        "Verification is off by default.",
        "adapters/tls.py",
        'verify=options.get("no_verify_ssl", "0") == "0",',
        'verify=options.get("no_verify_ssl", "1") == "0",',
        ("tests/unit/adapters/test_tls.py",),
    ),
    Mutant(
        "TLS files with amqp:// are ignored, and nothing is encrypted.",
        "adapters/tls.py",
        "            _refuse_unencrypted(endpoint, address)\n",
        "",
        ("tests/unit/adapters/test_tls.py",),
    ),
    Mutant(
        "A truncated delivery is read beyond its frame: its tag comes from the following bytes.",
        f"{_WIRE}/frame_fastpath.py",
        "not shortest <= size <= largest",
        "size > largest",
        (f"{_UNIT}/test_frame_parser.py", f"{_UNIT}/test_fuzz.py"),
    ),
    Mutant(
        "A body may be as large as its 64-bit header says.",
        f"{_WIRE}/frame_parser.py",
        "if content.missing > LARGEST:",
        "if False:",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "If the broker sets no limit, a frame may have 4 GiB.",
        f"{_WIRE}/frame_parser.py",
        "min(self.frame_max, LARGEST)",
        "self.frame_max",
        (f"{_UNIT}/test_frame_parser.py",),
    ),
    Mutant(
        "A series begins with its first event: an alert misses the first dead letter.",
        "observers/prometheus.py",
        "            self.count(metrics.dead_letters, reason.value, by=0)\n",
        "            pass\n",
        ("tests/unit/observers/test_prometheus.py",),
    ),
    Mutant(
        "What is held is shown by no metric.",
        "runtime/worker.py",
        "            current.held if current else 0,\n        )\n\n    async",
        "            0,\n        )\n\n    async",
        ("tests/unit/observers/test_prometheus.py", "tests/unit/observers/test_otel.py"),
    ),
    Mutant(
        "Looking at a large queue needs 100 bytes of memory for each message that is held.",
        "core/settlement.py",
        "self._outstanding = dict.fromkeys(tags[surplus:])",
        "self._outstanding = dict.fromkeys(tags)",
        ("tests/unit/core/test_ledger.py",),
    ),
    Mutant(
        "Frames settle an old delivery together with others that aren't decided.",
        "core/settlement.py",
        "for tag in chain(self._old, self._outstanding):",
        "for tag in self._outstanding:",
        ("tests/unit/core/test_ledger_machine.py",),
    ),
    Mutant(
        "A replay publishes copies that the broker must refuse, and all of them are in doubt.",
        "dead_letters.py",
        "Topology(exchanges=exchanges, publishes=(check,))",
        "Topology(exchanges=exchanges)",
        ("tests/unit/shell/test_dead_letter_tools.py",),
    ),
    Mutant(
        "A replay that the broker refuses says that letters may be in both queues.",
        "dead_letters.py",
        "if doubtful := outcomes.count(Outcome.UNKNOWN):",
        "if (doubtful := outcomes.count(Outcome.UNKNOWN)) or not self._publisher.is_open:",
        ("tests/unit/shell/test_dead_letter_tools.py",),
    ),
    Mutant(
        "A refusal by the default exchange leaves it open whether copies are stored.",
        f"{_WIRE}/confirms.py",
        "{exchange or 'amq.default'}",
        "{exchange}",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "A permission that lacks for one topic is taken to lack for the whole exchange.",
        f"{_WIRE}/confirms.py",
        "topic is None or topic[1] == key",
        "True",
        (f"{_UNIT}/test_confirms.py",),
    ),
    Mutant(
        "A trace shows the password in the text of an exception.",
        "masking.py",
        "    return mask_text(escape_controls(shorten(safe_str(error))))\n",
        "    return escape_controls(shorten(safe_str(error)))\n",
        ("tests/unit/observers/test_otel.py",),
    ),
    Mutant(
        "A traceback in a trace is as long as the text of an exception.",
        "masking.py",
        'shorten(each.rstrip("\\n")) + "\\n" for each in pieces',
        "each for each in pieces",
        ("tests/unit/observers/test_otel.py",),
    ),
    Mutant(
        "Traces don't say which version of the library, and of the conventions, they follow.",
        "observers/otel.py",
        "trace.get_tracer(*scope, tracer_provider, SCHEMA)",
        "trace.get_tracer(SCOPE, tracer_provider=tracer_provider)",
        ("tests/unit/observers/test_otel.py",),
    ),
    Mutant(
        "A handler blocks the loop, the broker cuts the connection, and no line says why.",
        "adapters/connecting.py",
        "        if late > self._heartbeat / 2:\n",
        "        if False:\n",
        (f"{_UNIT}/test_connection.py",),
    ),
    Mutant(
        "A body that was yielded by mistake is logged.",
        "core/results.py",
        'return f"something of {type(item)}"',
        "return repr(item)",
        ("tests/unit/core/test_results.py", "tests/unit/shell/test_body_privacy.py"),
    ),
    Mutant(
        "A password in a URL option is shown.",
        "masking.py",
        "    return _OPTION.sub(_mask_option, _mask_credentials(url))",
        "    return _mask_credentials(url)",
        ("tests/unit/test_settings.py",),
    ),
    Mutant(
        "Masking starts again at each `://`: a hostile text stops the process for minutes.",
        "masking.py",
        '    return _WORD.sub(_mask_word, text) if "://" in text else text',
        '    return re.sub(r"(://[^\\s:/@]*):\\S*@", r"\\1:***@", text)',
        ("tests/unit/test_masking.py",),
    ),
    Mutant(
        "A quote ends the password of a URL in a text: the rest of it is shown.",
        "masking.py",
        '_WORD = re.compile(r"\\S+")',
        '_WORD = re.compile(r"[^\\s\'\\"]+")',
        ("tests/unit/test_masking.py",),
    ),
    Mutant(
        "The representation of an endpoint contains its URL with the password.",
        "transport.py",
        "    url: str = field(repr=False)\n",
        "    url: str\n",
        ("tests/unit/adapters/test_tls.py",),
    ),
)

_REPAIR = "tests/unit/shell/test_dead_letter_tools.py"
_CLOSED = "test_a_classic_queue_gets_its_dead_letters_back_when_the_channel_is_closed"

REPAIR = (
    Mutant(
        "A dead letter is acknowledged although its copy is not confirmed: it is lost.",
        "dead_letters.py",
        "            if outcome is Outcome.CONFIRMED:",
        "            if outcome is not Outcome.RETURNED:",
        (f"{_REPAIR}::test_no_letter_is_lost",),
    ),
    Mutant(
        "A message that is dead-lettered again during a replay is replayed forever.",
        "queue_browser.py",
        "count = int(min(left, CHUNK))",
        "count, self.ready = CHUNK, 10**6",
        (f"{_REPAIR}::test_letters_that_die_again_meanwhile_are_not_replayed_again",),
    ),
    Mutant(
        "Dead letters are read until their queue drops them.",
        "core/dead_letter.py",
        "SPARE_DELIVERIES = 5",
        "SPARE_DELIVERIES = -1",
        (f"{_REPAIR}::test_looking_stops_before_the_delivery_limit",),
    ),
    Mutant(
        "Looking costs a delivery although RabbitMQ 4.3 would not count it.",
        "core/dead_letter.py",
        "return version is not None and version < NACK_IS_FREE_SINCE",
        "return True",
        (f"{_REPAIR}::test_since_4_3_looking_is_not_counted",),
    ),
    Mutant(
        "A classic queue of RabbitMQ 4.3 is busy for long after many were looked at.",
        "core/dead_letter.py",
        "if _names_classic_queue(unequal_argument(refusal)):\n        return True",
        "pass",
        (f"tests/unit/core/test_dead_letter.py::{_CLOSED}",),
    ),
)

_SUPERVISOR = "tests/unit/cli/test_supervisor.py"
_PROCESSES = "tests/unit/cli/test_process_manager.py"
_PROMETHEUS = "tests/unit/observers/test_prometheus.py"
_OTEL = "tests/unit/observers/test_otel.py"
_LEFT_BEHIND = "test_a_span_that_the_handler_leaves_behind_is_not_the_parent_of_the_settlement"

OPERATION = (
    Mutant(
        "A pause of the supervisor looks as if its processes were hung.",
        "cli/process_manager.py",
        "slot.last_heartbeat = min(slot.last_heartbeat + seconds, now)",
        "pass",
        (f"{_PROCESSES}::test_time_for_which_the_supervisor_was_paused_counts_for_no_process",),
    ),
    Mutant(
        "A killed process counts as ready until its exit is known.",
        "cli/process_manager.py",
        "if slot.phase is not Phase.UP or not slot.is_ready]",
        "if not slot.is_ready]",
        (f"{_PROCESSES}::test_a_killed_process_is_not_ready_whatever_its_last_heartbeat",),
    ),
    Mutant(
        "A lack of descriptors or threads ends the supervisor.",
        "cli/supervisor.py",
        "except (OSError, RuntimeError) as error:",
        "except BlockingIOError as error:",
        (f"{_SUPERVISOR}::test_a_start_that_fails_never_ends_the_supervisor",),
    ),
    Mutant(
        "Processes import modules of the current folder ahead of the standard library.",
        "cli/supervisor.py",
        'return options if "-P" in options else [*options, "-P"]',
        "return options",
        (f"{_SUPERVISOR}::test_the_current_folder_is_not_on_the_path_of_a_process",),
    ),
    Mutant(
        "A signal to the whole group ends a process that still imports.",
        "cli/supervisor.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        (f"{_SUPERVISOR}::test_a_process_starts_with_its_signals_blocked",),
    ),
    Mutant(
        "A second signal to the whole group abandons the drain of a supervised process.",
        "runtime/shutdown.py",
        "            self._was_signalled = True\n            self.drain()\n            return",
        "            self._was_signalled = True",
        ("tests/unit/shell/test_signals.py::test_signals_only_drain_a_supervised_process",),
    ),
    Mutant(
        "A settlement becomes a child of a span that the handler has left behind.",
        "observers/otel.py",
        "if otel_context.get_current() is not context:",
        "if False:",
        (f"{_OTEL}::{_LEFT_BEHIND}",),
    ),
    Mutant(
        "A link has the origin of the message before, although its own must be decoded.",
        "observers/otel.py",
        "if parts is None or parts != before:",
        "if parts != before:",
        (f"{_OTEL}::test_each_link_has_the_origin_of_its_own_message",),
    ),
    Mutant(
        "A span shows the number of messages of the batch before.",
        "observers/otel.py",
        "key = count, trigger\n",
        "key = 1, trigger\n",
        (f"{_OTEL}::test_the_attributes_of_a_batch_are_its_own",),
    ),
    Mutant(
        "The standby of a single active consumer looks stuck.",
        "observers/prometheus.py",
        "if each.buffered + each.in_hand:",
        "if True:",
        (f"{_PROMETHEUS}::test_a_worker_that_holds_nothing_is_never_behind",),
    ),
    Mutant(
        "Prometheus doesn't see the first burst of dead letters.",
        "observers/prometheus.py",
        "self.count(metrics.dead_letters, reason.value, by=0)",
        "pass",
        (f"{_PROMETHEUS}::test_every_series_of_an_alert_exists_before_its_first_burst",),
    ),
    Mutant(
        "One damaged file takes away all metrics.",
        "health/server.py",
        "return merge(filter(_is_readable, files))",
        "return merge(files)",
        (f"{_PROMETHEUS}::test_metrics_survive_a_damaged_file_and_a_missing_folder",),
    ),
    Mutant(
        "Idle clients keep a probe from its answer.",
        "health/http_server.py",
        "oldest.transport.abort()",
        "pass",
        ("tests/integration/test_health_server.py::test_idle_clients_make_room_for_others",),
    ),
)

_LOGGING = "tests/unit/cli/test_logging.py"

_TEST_STORIES = "tests/unit/testing/test_stories.py"

LOGS = (
    Mutant(
        "A story ends while a session that is being closed holds a message.",
        "testing/stories/player.py",
        "                and not record.ending\n",
        "",
        (f"{_TEST_STORIES}::test_nothing_is_done_while_a_session_is_being_closed",),
    ),
    Mutant(
        "A story ends while a session that was never cancelled holds a message.",
        "testing/stories/player.py",
        "self.ending.add(recorded)",
        "pass",
        (f"{_TEST_STORIES}::test_nothing_is_done_until_a_session_is_closed",),
    ),
    Mutant(
        "A story ends while a session holds what it returns at its end.",
        "testing/stories/player.py",
        "self._record.ending.add(self)",
        "pass",
        (f"{_TEST_STORIES}::test_nothing_is_done_after_the_cancel_of_a_session",),
    ),
    Mutant(
        "Dead letters behind the first window are never seen.",
        "queue_browser.py",
        "await session.resume(int(more))",
        "pass",
        ("tests/unit/cli/test_commands.py::test_show_finds_the_only_one_that_matches",),
    ),
    Mutant(
        "The text of an exception makes lines of its own in the log.",
        "cli/logging.py",
        'lines += self.formatException(record.exc_info).split("\\n")',
        "lines.append(self.formatException(record.exc_info)); return chr(10).join(lines)",
        (f"{_LOGGING}::test_content_of_messages_makes_no_lines_of_text",),
    ),
    Mutant(
        "NaN in the context makes a line that isn't JSON.",
        "cli/logging.py",
        "case float() if math.isfinite(value):",
        "case float() if value != math.inf:",
        (f"{_LOGGING}::test_json_survives_values_that_it_lacks",),
    ),
    Mutant(
        "An `extra` replaces the logger of a line.",
        "cli/logging.py",
        'line[f"{key}_" if key in _OUR_KEYS else key] = value',
        "line[key] = value",
        (f"{_LOGGING}::test_json_is_one_valid_object_in_a_line_whatever_the_context",),
    ),
    Mutant(
        "Brackets in a name end a command.",
        "cli/printing.py",
        "    return Text(escape_controls(text))\n",
        "    return Text.from_markup(escape_controls(text))\n",
        ("tests/integration/test_cli_streams.py::test_names_are_printed_whole",),
    ),
)

TABLE = (
    *FLOW,
    *NATIVE,
    *AMQP10,
    *WIRE,
    *SECURITY,
    *REPAIR,
    *PROGRAMS,
    *EXACTLY_ONCE,
    *OPERATION,
    *LOGS,
)
