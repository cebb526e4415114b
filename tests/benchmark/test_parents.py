"""No worker outlives the command that started it, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SDDPM

from benchmark.process import terminate_with_parent
from benchmark.runs import newest_run
from systems.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

SMALL = [option.removeprefix("--") for option in SDDPM[1:] if "max_epochs" not in option]


def children(parent: int) -> list[int]:
    """The processes that a process has started and that still run."""
    done = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [int(pid) for pid, ppid, state in rows if int(ppid) == parent and not state.startswith("Z")]


def runs(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def wait_for(condition: Callable[[], object], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def begin(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore SIGINT
    )


def end(command: subprocess.Popen[bytes], number: signal.Signals, seconds: float) -> None:
    """Ends a command by a signal, and checks that its workers end."""
    workers = children(command.pid)
    assert workers
    try:
        command.send_signal(number)
        wait_for(lambda: command.poll() is not None, seconds)
        wait_for(lambda: not any(map(runs, workers)), seconds)
        assert command.returncode in (128 + number, -number)
    finally:
        command.kill()
        for worker in filter(runs, workers):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_regression_check(number: signal.Signals, tmp_path: Path) -> None:
    long = ["--trainer.max_steps=1000000", "--trainer.max_epochs=-1"]
    command = begin(
        "regress", "--methods", "fsddim", "ddpm", "spiking_rwkv", "--workers=2", f"--output={tmp_path}", *long
    )
    wait_for(lambda: len(list(tmp_path.glob("*/*/log.txt"))) == 2)
    end(command, number, 20)
    assert len(list(tmp_path.glob("*/*/log.txt"))) == 2  # the third was never begun


def test_no_training_outlives_the_matrix(tmp_path: Path) -> None:
    options = ["--methods", "quickstart", "--datasets", "digits", "--configs", str(tmp_path), f"--output={tmp_path}"]
    (tmp_path / "quickstart_digits.yaml").write_text(Path("configs/quickstart.yaml").read_text())
    command = begin("matrix", *options, "--draft", "--set", *SMALL, "trainer.max_epochs=-1")
    wait_for(lambda: list(tmp_path.glob("*/*/checkpoints/last.ckpt")))
    end(command, signal.SIGKILL, 20)
    (log,) = tmp_path.glob("*/log.txt")
    assert "stopped by SIGTERM after step" in log.read_text()
    assert load_checkpoint(newest_run(log.parent) / "checkpoints" / "last.ckpt")["global_step"] >= 5


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_process_whose_parent_is_gone_already_ends_at_once() -> None:
    def orphan() -> None:
        terminate_with_parent(-1)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=orphan)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGTERM
