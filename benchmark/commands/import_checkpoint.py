"""`python -m benchmark import`: an authors' checkpoint becomes one of the suite."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import lightning
import torch

from systems.checkpoints import load_checkpoint, save_checkpoint

ENTRIES = ("ema_model", "net_model", "model_state_dict")
"""Where official files keep the network, averaged weights first."""


def import_checkpoint(
    checkpoint: str,
    output: str,
    method: Literal["sddpm", "sdm", "ddpm", "ann_snn", "fsddim", "spiking_diffusion"] = "sddpm",
    denoiser: str | None = None,
) -> None:
    """Turns an authors' checkpoint into one that `test` and `predict` accept.

    Every tensor must find its place: unknown and missing ones are listed. Nothing but tensors is unpickled.

    Args:
        checkpoint: Official file: a dict with `ema_model` (taken first), `net_model` or `model_state_dict`, or a state
            dict alone.
        output: File to write (.ckpt).
        method: Method the checkpoint belongs to.
        denoiser: Second file, of spiking_diffusion; diff_result/diff_model.pth beside the first if not given.

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
            f"{' with '.join(files)} is no {method} network: {error} not found among its tensors ({names}, ...)"
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
        raise ValueError(f"{source} holds no state dict; expected one of {', '.join(ENTRIES)}, or tensors by name")
    return content
