"""`python -m benchmark relay`: trains in legs of some minutes, on machines that keep no files between them."""

from __future__ import annotations

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

from benchmark.command_line import pass_through_parser
from benchmark.stages import DryRun, run_stage
from leaderboard.files import canonical_sha256, refuse_existing, write_atomic
from systems.base import DiffusionSystem

PROGRESS = "progress.json"
HALF_PRECISION_FROM = 4096
"""Number of elements from which a tensor is stored in float16: kernels, not norms, biases or temporal factors."""
DECAY = 0.999
"""Decay per step of the averaged weights, if the config has no averaging."""


def relay(args: Sequence[str]) -> None:
    """Trains for some minutes, from the weights in a folder if there are any, and writes averaged weights back to it.

    Optimiser and learning-rate schedule restart in each leg; noise and order of the images use another seed. The run
    folder of a leg has a checkpoint for `test`.

    Args:
        args: `--weights`, `--minutes`, `--piece_mb`, and any option of `fit`.

    Raises:
        ValueError: If the weights belong to another network, or a number is out of range.
        FileNotFoundError: If files of the weights are missing.
    """
    parser = pass_through_parser(
        "relay",
        "Trains for some minutes, starting from the weights in a folder if there are any, and writes the averaged "
        "weights back to it, large tensors in half precision, in files small enough to copy. All other options are "
        "passed on to `fit`.",
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of the weights, read and replaced")
    parser.add_argument("--minutes", type=float, required=True, help="length of this leg")
    parser.add_argument("--piece_mb", type=int, default=15, help="largest file, in MB")
    options, rest = parser.parse_known_args(args)
    if not options.minutes > 0 or options.piece_mb < 1:
        raise ValueError(f"--minutes {options.minutes} --piece_mb {options.piece_mb}; use numbers above 0")
    options.weights.mkdir(parents=True, exist_ok=True)  # fails now, not after the leg
    cli = run_stage(["fit", *rest], DryRun)
    system, trainer = cast(DiffusionSystem, cli.model), cli.trainer
    legs = load_weights(system, options.weights)
    seed_everything(int(os.environ.get("PL_GLOBAL_SEED", 0)) + len(legs))  # otherwise noise and order would repeat
    callbacks = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
    if not any(isinstance(callback, EMAWeightAveraging) for callback in callbacks):
        callbacks.append(EMAWeightAveraging(decay=DECAY))
    callbacks.append(Timer(datetime.timedelta(minutes=options.minutes)))
    with cli.without_remains():
        trainer.fit(system, datamodule=cli.datamodule)
    trainer.save_checkpoint(cli.run_folder / "checkpoints" / "last.ckpt")
    if trainer.is_global_zero:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        legs.append({"steps": trainer.global_step, "minutes": round(options.minutes, 2), "device": device})
        save_weights(system, options.weights, legs, options.piece_mb)
        steps = sum(leg["steps"] for leg in legs)
        print(f"{steps} steps, {len(legs)} legs: {options.weights}")


def load_weights(system: DiffusionSystem, folder: Path) -> list[dict[str, Any]]:
    """Loads the weights of the last leg, if there was one, and returns the list of earlier legs.

    Raises:
        ValueError: If the weights belong to another method, diffusion process or network.
        FileNotFoundError: If files of the weights are missing.
        FileExistsError: If the folder of the first leg exists, and nothing says that it is one.
    """
    progress = folder / PROGRESS
    if not progress.is_file():
        refuse_existing(folder / "leg-1", option="--weights, since this folder contains no earlier leg")
        return []
    content, expected = json.loads(progress.read_text()), _identity(system)
    if different := [f"{k}={content.get(k)} instead of {v}" for k, v in expected.items() if content.get(k) != v]:
        raise ValueError(
            f"{folder} has weights with {'; '.join(different)}; use the same --model options, or another folder"
        )
    missing = [name for name in content["files"] if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; copy all files of the earlier leg")
    load_torch_model(system.network, (folder / content["files"][0]).parent, strict=True)
    return list(content["legs"])


def save_weights(system: DiffusionSystem, folder: Path, legs: list[dict[str, Any]], piece_mb: int) -> None:
    """Writes the weights in files of limited size, then `progress.json`: a kill leaves the old or the new weights.

    Each leg has its own folder; the folders of earlier legs are removed at the end.
    """
    target = folder / f"leg-{len(legs)}"
    shutil.rmtree(target, ignore_errors=True)  # left by a leg that was killed
    target.mkdir(parents=True)
    state = {name: _to_file_format(tensor) for name, tensor in system.network.state_dict().items()}
    save_torch_state_dict(state, target, max_shard_size=f"{piece_mb}MB")
    files = [str(path.relative_to(folder)) for path in sorted(target.iterdir())]
    content = _identity(system) | {"legs": legs, "files": files}
    write_atomic(folder / PROGRESS, json.dumps(content, indent=1) + "\n")
    for number in range(1, len(legs)):
        shutil.rmtree(folder / f"leg-{number}", ignore_errors=True)


def _identity(system: DiffusionSystem) -> dict[str, Any]:
    """Identifies the network: method, options of the diffusion process, and a hash of the shapes of all tensors."""
    shapes = {name: list(tensor.shape) for name, tensor in system.state_dict().items()}
    process = {name: value for name, value in system.process.items() if not isinstance(value, Tensor)}
    return {"method": system.method, "process": process, "network": canonical_sha256(shapes)[:16]}


def _to_file_format(tensor: Tensor) -> Tensor:
    return (
        (tensor.half() if tensor.is_floating_point() and tensor.numel() >= HALF_PRECISION_FROM else tensor)
        .contiguous()
        .cpu()
    )
