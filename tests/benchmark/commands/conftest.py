from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import forked

from benchmark.cli import main
from benchmark.commands import matrix


@pytest.fixture
def in_process(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs commands in forked processes, which have imported everything, and notes them."""
    commands: list[list[str]] = []

    class Forked:
        def __init__(self, command: list[str], stdout: object, stderr: int, env: dict[str, str]) -> None:
            commands.append(command[3:])
            self.process = forked(lambda: main(command[3:]), Path(stdout.name))  # type: ignore[attr-defined]

        def wait(self) -> int:
            self.process.join()
            return int(self.process.exitcode or 0)

        def send_signal(self, number: int) -> None:
            if self.process.is_alive():
                os.kill(int(self.process.pid or 0), number)

    monkeypatch.setattr(matrix, "Popen", Forked)
    return commands
