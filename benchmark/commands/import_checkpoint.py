"""`python -m benchmark import`: converts a checkpoint released by authors into one of the suite."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import lightning
import torch

from systems.checkpoints import load_checkpoint, save_checkpoint

ENTRIES = ("ema_model", "net_model", "model_state_dict", "model")
"""Keys of the network in released files, averaged weights first."""


def import_checkpoint(
    checkpoint: str,
    output: str,
    method: Literal["sddpm", "sdm", "ddpm", "ann_snn", "fsddim", "spiking_diffusion", "sdit"] = "sddpm",
    denoiser: str | None = None,
) -> None:
    """Converts a checkpoint released by authors into one that `test` and `predict` accept.

    Every tensor must have a counterpart: unknown and missing ones are listed. Only tensors are unpickled.

    Args:
        checkpoint: Released file: a dict with `ema_model` (preferred), `net_model`, `model_state_dict` or `model`, or a
            plain state dict.
        output: File to write (.ckpt).
        method: Method the checkpoint belongs to.
        denoiser: Second file of spiking_diffusion; null uses diff_result/diff_model.pth next to the first.

    Raises:
        ValueError: If the file is not a checkpoint of the method.
        CheckpointMismatchError: If tensors are unknown, missing or of another shape.
    """
    files = [checkpoint]
    if method == "spiking_diffusion":
        files.append(denoiser or str(Path(checkpoint).parent / "diff_result" / "diff_model.pth"))
    elif denoiser is not None:
        raise ValueError(f"--denoiser {denoiser} belongs to spiking_diffusion; {method} is imported from one file")
    states = [_state(load_checkpoint(file), file) for file in files]
    try:
        tensors, arguments = import_module(f"systems.{method}").read_official(*states)
    except (KeyError, ValueError, IndexError) as error:
        names = ", ".join(name for state in states for name in list(state)[:3])
        raise ValueError(
            f"{' with '.join(files)} is not a {method} network: {error} not found among its tensors ({names}, ...)"
        ) from None
    save_checkpoint(
        {
            "state_dict": {f"network.{key}": value for key, value in tensors.items()},
            "method": method.replace("_", "-"),
            "pytorch-lightning_version": lightning.__version__,
            "epoch": 0,
            "global_step": 0,
        },
        output,
    )
    config = "configs/ddpm_DATASET.yaml --model ANNSNN" if method == "ann_snn" else f"configs/{method}_DATASET.yaml"
    options = " ".join(f"--model.{k} {v}".replace(" [", " '[").replace("]", "]'") for k, v in arguments.items())
    print(
        f"{len(tensors)} tensors from {' and '.join(files)} to {output}\nsize:  {options}\n"
        f"test:  python -m benchmark test --config {config} --ckpt_path {output}"
    )


def _state(content: Any, source: str) -> dict[str, torch.Tensor]:
    if isinstance(content, dict):
        content = next((content[entry] for entry in ENTRIES if entry in content), content)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{source} contains no state dict; expected one of {', '.join(ENTRIES)}, or tensors by name")
    return content
