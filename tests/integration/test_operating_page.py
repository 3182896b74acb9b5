"""The commands of docs/operating.md lead from nothing to two supervised processes with metrics.

They run as they are on the page, except for the installation; ports and queues are unique.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

from aio_pika_batch.testing.rabbitmq.processes import free_port, kill_group, spawn
from tests.integration.helpers import PATIENCE, holds, publish, until

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
SECTION = PAGE.partition("## In five commands")[2].partition("\n## ")[0]
SHOP = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[0]
COMMANDS = re.findall(r"^\$ (.*)$", SECTION, re.MULTILINE)


async def test_the_five_commands_work(tmp_path, amqp_url, channel, name, monkeypatch) -> None:
    """Checked, run by a supervisor, ready, and counted."""
    install, check, run, health, curl = COMMANDS
    assert "pip install" in install
    port = str(free_port())
    monkeypatch.setenv("AIO_PIKA_BATCH_URL", amqp_url)
    (tmp_path / "shop.py").write_text(SHOP.replace('"orders', f'"{name}'))

    def arguments(command: str) -> list[str]:
        program, *rest = command.replace("8080", port).split()
        assert "aio-pika-batch" == program
        return [sys.executable, "-m", "aio_pika_batch", *rest]

    def ends_well(command: str) -> bool:
        done = subprocess.run(
            arguments(command), cwd=tmp_path, capture_output=True, timeout=2 * PATIENCE, check=False
        )
        return 0 == done.returncode

    log = tmp_path / "log"
    assert ends_well(check)
    with log.open("wb") as output:
        supervisor = spawn(arguments(run), cwd=tmp_path, stdout=output)
    try:
        await until(lambda: ends_well(health), what=log.read_text)
        await publish(channel, [b"1", b"2", b"3"], routing_key=name)
        await holds(amqp_url, name, 0)

        def counted() -> bool:
            with urlopen(curl.split()[1].replace("8080", port), timeout=PATIENCE) as answer:  # noqa: S310
                metrics = answer.read().decode()
            return bool(re.search(r'messages_settled_total\{.*result="ack"\} 3\.0', metrics))

        await until(counted)
    finally:
        kill_group(supervisor)
        for queue in (name, f"{name}.dead"):
            await channel.queue_delete(queue)
        await channel.exchange_delete(f"{name}.dlx")
