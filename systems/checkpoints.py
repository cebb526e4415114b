"""Checkpoint files: read without running code, checked against a network, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ADVICE = re.compile("Weights only load failed|Please file an issue|Check the documentation")
"""Lines of torch's refusal to unpickle something."""

CONTENT = {
    "state_dict": dict,
    "pytorch-lightning_version": str,
    "method": str,
    "process": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Types of the entries of the suite's checkpoints."""


UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    zipfile.BadZipFile,
)
"""What is raised for files that are no checkpoints, or damaged ones."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not belong to the method or network it is loaded into."""


def load_checkpoint(path: str | Path) -> Any:
    """Reads a file written by `torch.save`; nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a checkpoint")
    try:
        if zipfile.is_zipfile(path):  # whose checksums torch does not look at
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors (truncated, or holding code): {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """First sentence of an error; of torch's refusal to run code what it refused, not the advice to run it."""
    lines = [line for line in str(error).splitlines() if line and not ADVICE.search(line)]
    return lines[0].split(". ")[0] if lines else type(error).__name__


def save_checkpoint(content: Any, path: str | Path) -> None:
    """Writes a file for `load_checkpoint`, so that a reader sees all of it or nothing, also after a power cut.

    Raises:
        OSError: If it cannot be written; a file that was there before is whole.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")  # one that a killed process left is overwritten
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        kept = f"the checkpoint that was there before is whole: {path}" if path.is_file() else "there is none yet"
        size = f"{buffer.getbuffer().nbytes / 2**20:,.1f} MiB"
        raise OSError(
            f"the checkpoint {path} ({size}) cannot be written ({error.strerror}); {kept}; make room or let the folder "
            "be written to, then go on with `python -m benchmark fit --ckpt_path last`"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_suite(path: str | Path, *needed: str) -> dict[str, Any]:
    """Reads a checkpoint that the suite wrote while training, or imported.

    Args:
        path: The file.
        needed: Entries that it must have besides its weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
        CheckpointMismatchError: If it is not of the suite.
    """
    content = load_checkpoint(path)
    if not isinstance(content, dict) or not {"state_dict", *needed} <= content.keys():
        raise CheckpointMismatchError(
            f"{path} is no checkpoint of the suite; for an authors' file use `python -m benchmark import` first"
        )
    kinds = {key: kind for key, kind in CONTENT.items() if key in content}
    wrong = [f"{key} is no {kind.__name__}" for key, kind in kinds.items() if not isinstance(content[key], kind)]
    if not wrong:
        wrong = [f"{key} is no tensor" for key, value in content["state_dict"].items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointMismatchError(f"{path} was tampered with: {', '.join(wrong[:5])}; train or fetch it again")
    return content


def network_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the weights of the network of a checkpoint."""
    prefix = "network."
    state = checkpoint["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def read_trained(path: str | Path, method: str) -> dict[str, Any]:
    """Reads a checkpoint of the suite for one method.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
        CheckpointMismatchError: If it is not of the suite, or of another method.
    """
    content = read_suite(path)
    check_method(content, method, str(path))
    return content


def check_method(checkpoint: Mapping[str, Any], method: str, source: str) -> None:
    """Checks that a checkpoint belongs to a method, as far as it says.

    Raises:
        CheckpointMismatchError: If it belongs to another one.
    """
    found = checkpoint.get("method", method)
    if found != method:
        raise CheckpointMismatchError(
            f"{source} is of method {found!r}, expected one of {method!r}; give such a checkpoint, or the "
            f"configuration of {found!r}"
        )


def rename(state: Mapping[str, Tensor], name: Callable[[str], str]) -> dict[str, Tensor]:
    """Renames the tensors of a state dict.

    Raises:
        CheckpointMismatchError: If two would have one name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if name(key) in renamed:
            raise CheckpointMismatchError(f"the official checkpoint has two tensors {name(key)}, one of them as {key}")
        renamed[name(key)] = value
    return renamed


def check_state(state: Mapping[str, Tensor], network: nn.Module, source: str) -> None:
    """Checks that a state dict has exactly the tensors of a network.

    Args:
        state: Tensors by name.
        network: The network they shall be loaded into.
        source: What the state is, for the message.

    Raises:
        CheckpointMismatchError: If names are missing or unknown, or shapes differ; lists them.
    """
    own = network.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise CheckpointMismatchError(
            f"{source} does not fit the configured network ({listing}); use the configuration it was trained with, "
            "for a run of the suite the config.yaml in its folder"
        )
