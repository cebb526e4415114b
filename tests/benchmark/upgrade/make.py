"""Makes the run beside this file, and the record in tests/leaderboard, with the present version of the suite.

Run it only when the format of checkpoints, configs or records is changed on purpose: the files stand for those of users
of the previous version. `python tests/benchmark/upgrade/make.py`
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[1] / "leaderboard" / "record" / "record_v1.json"
OPTIONS = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=6",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--monitor.every_n_epochs=0",
    "--model.base_channels=4",
    "--model.channel_mult=[1]",
    "--model.scheduler.num_train_timesteps=50",
    "--model.num_inference_steps=3",
    "--data.batch_size=256",
    "--data.num_samples=60",
    "--data.sample_batch_size=60",
]


def numbers(run: Path) -> dict[str, float]:
    """Loss of eight images and sum of two samples, from the last checkpoint of a run."""
    from benchmark.runs import load_run

    system, _ = load_run(run / "checkpoints" / "last.ckpt")
    images = torch.linspace(-1, 1, 8 * 64).view(8, 1, 8, 8)
    with torch.no_grad():
        loss = system.loss(images, torch.Generator().manual_seed(0))
    return {"loss": float(loss), "samples": float(system.sample(torch.arange(2), (1, 8, 8)).abs().sum())}


def make() -> None:
    """Trains, tests, and copies config, checkpoint and record."""
    from benchmark.cli import main
    from benchmark.runs import newest_run

    quickstart = HERE.parents[2] / "configs" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the files contain no path of this machine
        shutil.copy(quickstart, "quickstart.yaml")
        main(["fit", "--config=quickstart.yaml", *OPTIONS])
        main(["test", "--draft"])
        run = newest_run(Path("runs"))
        shutil.rmtree(HERE / "run", ignore_errors=True)
        for name in ("config.yaml", "checkpoints/last.ckpt"):
            (HERE / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / name, HERE / "run" / name)
        shutil.copy(next((run / "records").glob("*.json")), RECORD)
    (HERE / "numbers.json").write_text(json.dumps(numbers(HERE / "run"), indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[2]))
    make()
