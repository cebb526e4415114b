"""`python -m benchmark import`: converts a checkpoint released by authors into one of the suite."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import lightning
from torch import Tensor

from leaderboard.files import refuse_existing
from systems.checkpoints import load_checkpoint, rename, save_checkpoint

ENTRIES = (
    *("ema_model", "model_ema", "ema_state_dict", "params_ema", "ema", "shadow"),
    *("net_model", "model_state_dict", "state_dict", "model", "network", "net", "params"),
)
"""Keys of the network in released files, averaged weights first."""

WRAPPERS = ("ema_model", "model_ema", "ema", "module", "_orig_mod", "model", "network", "net", "online_model")
"""Attributes in which training code wraps the whole network, averaged weights first."""

COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")
"""Tensors that wrappers of averaged weights keep beside the network."""


def import_checkpoint(
    checkpoint: str,
    output: str,
    method: Literal["sddpm", "sdm", "ddpm", "ann_snn", "fsddim", "spiking_diffusion", "sdit"] = "sddpm",
    denoiser: str | None = None,
) -> None:
    """Converts a checkpoint released by authors into one that `test` and `predict` accept.

    Every tensor must have a counterpart: unknown and missing ones are listed. Only tensors are unpickled.

    Args:
        checkpoint: Released file (of `torch.save`, or .safetensors): a state dict, or a dict that contains one as
            `ema_model` (preferred), `net_model`, `model_state_dict`, `state_dict`, ...; prefixes of wrappers such as
            `module.`, `_orig_mod.` or `ema.` are removed.
        output: File to write (.ckpt).
        method: Method the checkpoint belongs to.
        denoiser: Second file of spiking_diffusion; null uses diff_result/diff_model.pth next to the first.

    Raises:
        FileExistsError: If the output exists.
        ValueError: If the file is not a checkpoint of the method.
        CheckpointMismatchError: If tensors are unknown, missing or of another shape.
    """
    refuse_existing(Path(output), option="output file")
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


def _state(content: Any, source: str) -> dict[str, Tensor]:
    """Returns the network's state dict from the content of a file, without the prefixes of wrappers."""
    if isinstance(content, dict) and {"method", "state_dict", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(f"{source} is a checkpoint of the suite already; use it as --ckpt_path {source}")
    entries = []
    while entry := _entry(content):
        entries.append(entry)
        content = content[entry]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{source} contains no state dict; expected one of {', '.join(ENTRIES)}, or tensors by name")
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{source} contains no state dict{' in ' + '/'.join(entries) if entries else ''}: {', '.join(others[:5])} "
            f"{'is not a tensor' if len(others) == 1 else 'are not tensors'}; expected one of {', '.join(ENTRIES)}, or "
            "tensors by name"
        )
    return _unwrap({str(key): value for key, value in content.items()})


def _entry(content: Any) -> str | None:
    """Returns the key of the dict that contains the network, None if `content` is a state dict itself."""
    if not isinstance(content, dict):
        return None
    nested = (entry for entry in ENTRIES if isinstance(content.get(entry), dict) and content[entry])
    return next(
        (entry for entry in nested if any(isinstance(v, (Tensor, dict)) for v in content[entry].values())), None
    )


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes of wrappers around the whole network, and of compiled modules anywhere."""
    state = rename(state, lambda key: key.replace("._orig_mod.", "."))
    while True:
        inner = {key: value for key, value in state.items() if key not in COUNTERS}
        found = {key.partition(".")[0] for key in inner}
        if not found or not found <= set(WRAPPERS) or not all("." in key for key in inner):
            return state
        prefix = next(name for name in WRAPPERS if name in found) + "."
        state = {key.removeprefix(prefix): value for key, value in inner.items() if key.startswith(prefix)}
