"""`python -m benchmark import`: an authors' checkpoint becomes one of the suite."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import lightning
import torch

from systems.sddpm import convert_official, infer_arguments
from systems.spiking_unet import SpikingUNet


def import_checkpoint(checkpoint: str, output: str, method: Literal["sddpm"] = "sddpm") -> None:
    """Turns an authors' checkpoint into one that `test` and `predict` accept.

    Every tensor must find its place: unknown and missing ones are listed. Nothing but tensors is unpickled.

    Args:
        checkpoint: Official file: a dict with `net_model`, or its state dict alone.
        output: File to write (.ckpt).
        method: Method the checkpoint belongs to.

    Raises:
        ValueError: If the file is not a checkpoint of the method.
        CheckpointMismatchError: If tensors are unknown, missing or of another shape.
    """
    state = _read(Path(checkpoint))
    try:
        size = infer_arguments(state)
    except (KeyError, ValueError, IndexError) as error:
        names = ", ".join(list(state)[:3])
        raise ValueError(
            f"{checkpoint} is no {method} network: {error} not found among its tensors ({names}, ...)"
        ) from None
    with torch.device("meta"):
        network = SpikingUNet(**size)
    converted = convert_official(state, network)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    torch.save(
        {
            "state_dict": {f"network.{key}": value for key, value in converted.items()},
            "pytorch-lightning_version": lightning.__version__,
            "epoch": 0,
            "global_step": 0,
        },
        part,
    )
    part.replace(path)
    arguments = " ".join(
        f"--model.{k} {v}".replace(" [", " '[").replace("]", "]'") for k, v in size.items() if k[:9] != "num_train"
    )
    print(
        f"{len(converted)} tensors from {checkpoint} to {path}\nsize:  {arguments}\n"
        f"test:  python -m benchmark test --config configs/{method}_DATASET.yaml --ckpt_path {path}"
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the official checkpoint (.pt)")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors (truncated, or holding code): {reason}"
        ) from None
    if isinstance(content, dict):
        content = content.get("net_model", content)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; expected a dict with `net_model`, or tensors by name")
    return content
