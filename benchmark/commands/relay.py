"""`python -m benchmark relay`: a training in legs, on machines that are lent for minutes and keep nothing."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import load_torch_model, save_torch_state_dict
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, Timer
from torch import Tensor

from benchmark.stages import Rehearsal, run_stage
from leaderboard.files import canonical_sha256, write_atomic
from systems.base import DiffusionSystem

PROGRESS = "progress.json"
LARGE = 4096
"""Elements from which a tensor is written in half precision: kernels, but no norms, biases or temporal factors."""
DECAY = 0.999
"""Of the averaged weights, per step, where the configuration averages none."""


def relay(args: Sequence[str]) -> None:
    """Trains for some minutes, from the weights in a folder if there are any, and leaves the averaged weights there.

    Optimiser and learning-rate schedule start anew in each leg; noise and order of the images go on with another seed.
    The run folder of a leg has a checkpoint for `test`.

    Args:
        args: `--weights`, `--minutes`, `--piece_mb`, and any option of `fit`.

    Raises:
        ValueError: If the weights are of another network, or a number is out of range.
        FileNotFoundError: If pieces of the weights are missing.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmark relay",
        description="Trains for some minutes, from the weights in a folder if there are any, and leaves the averaged "
        "weights there, kernels in half precision, in files small enough to carry. All other options are those of fit.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights, taken and left")
    parser.add_argument("--minutes", type=float, required=True, help="length of this leg")
    parser.add_argument("--piece_mb", type=int, default=15, help="largest file, in MB")
    options, rest = parser.parse_known_args(args)
    if not options.minutes > 0 or options.piece_mb < 1:
        raise ValueError(f"--minutes {options.minutes} --piece_mb {options.piece_mb}; give numbers above 0")
    options.weights.mkdir(parents=True, exist_ok=True)  # refused now, not after the leg
    cli = run_stage(["fit", *rest], Rehearsal)
    system, trainer = cast(DiffusionSystem, cli.model), cli.trainer
    legs = take(system, options.weights)
    seed_everything(int(os.environ.get("PL_GLOBAL_SEED", 0)) + len(legs))  # else noise and order would repeat
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    if not any(isinstance(callback, EMAWeightAveraging) for callback in callbacks):
        callbacks.append(EMAWeightAveraging(decay=DECAY))
    callbacks.append(Timer(datetime.timedelta(minutes=options.minutes)))
    trainer.fit(system, datamodule=cli.datamodule)
    trainer.save_checkpoint(cli.run_folder / "checkpoints" / "last.ckpt")
    if trainer.is_global_zero:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        legs.append({"steps": trainer.global_step, "minutes": round(options.minutes, 2), "device": device})
        leave(system, options.weights, legs, options.piece_mb)
        steps = sum(leg["steps"] for leg in legs)
        print(f"{steps} steps, {len(legs)} legs: {options.weights}")


def take(system: DiffusionSystem, folder: Path) -> list[dict[str, Any]]:
    """Loads the weights that an earlier leg left, if any, and returns what the legs before were.

    Raises:
        ValueError: If they are of another method, diffusion process or size.
        FileNotFoundError: If pieces are missing.
    """
    progress = folder / PROGRESS
    if not progress.is_file():
        return []
    content, ours = json.loads(progress.read_text()), _identity(system)
    if different := [f"{k}={content.get(k)} instead of {v}" for k, v in ours.items() if content.get(k) != v]:
        raise ValueError(
            f"{folder} has weights of {'; '.join(different)}; give --model their values, or another folder"
        )
    missing = [name for name in content["files"] if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; bring all files of the earlier leg")
    load_torch_model(system.network, (folder / content["files"][0]).parent, strict=True)
    return list(content["legs"])


def leave(system: DiffusionSystem, folder: Path, legs: list[dict[str, Any]], piece_mb: int) -> None:
    """Writes the weights in pieces, kernels in half precision, and last what they are: a kill leaves old or new ones.

    Each leg has a folder of its own, and those of earlier ones go when it is complete.
    """
    place = folder / f"leg-{len(legs)}"
    shutil.rmtree(place, ignore_errors=True)  # of a leg that was killed
    place.mkdir(parents=True)
    state = {name: _halve(tensor) for name, tensor in system.network.state_dict().items()}
    save_torch_state_dict(state, place, max_shard_size=f"{piece_mb}MB")
    files = [str(path.relative_to(folder)) for path in sorted(place.iterdir())]
    content = _identity(system) | {"legs": legs, "files": files}
    write_atomic(folder / PROGRESS, json.dumps(content, indent=1) + "\n")
    for other in folder.glob("leg-*"):
        if other != place:
            shutil.rmtree(other)


def _identity(system: DiffusionSystem) -> dict[str, Any]:
    """What weights are of: method, diffusion process, and the shapes of all tensors as a hash."""
    shapes = {name: list(tensor.shape) for name, tensor in system.state_dict().items()}
    process = getattr(system, "process", {})
    return {"method": system.method, "process": process, "network": canonical_sha256(shapes)[:16]}


def _halve(tensor: Tensor) -> Tensor:
    return (tensor.half() if tensor.is_floating_point() and tensor.numel() >= LARGE else tensor).contiguous().cpu()
