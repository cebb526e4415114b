"""What an earlier version left behind stays readable: a run with its configuration and checkpoint, and a record.

`upgrade/make.py` made them; it says when to make them again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny import resume

from benchmark.runs import find_checkpoint, newest_run
from systems.checkpoints import load_checkpoint

UPGRADE = Path(__file__).with_name("upgrade")
sys.path.insert(0, str(UPGRADE))

from make import RECORD, numbers  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("uncompiled")]


def test_a_checkpoint_gives_the_numbers_that_it_gave() -> None:
    recorded = json.loads((UPGRADE / "numbers.json").read_text())
    found = numbers(UPGRADE / "run")
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-3)
    assert found["samples"] == pytest.approx(recorded["samples"], rel=5e-2)  # rounding may flip a spike


def test_a_training_goes_on(tmp_path: Path) -> None:
    shutil.copytree(UPGRADE / "run", tmp_path / "run")
    resume(tmp_path, "--trainer.max_steps=8", "--data.num_samples=20")
    assert load_checkpoint(find_checkpoint(newest_run(tmp_path)))["global_step"] == 8


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in [RECORD, *UPGRADE.rglob("*.*")]) < 200_000
