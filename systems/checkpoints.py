"""Checkpoint files: read without executing code, checked against a network, written atomically."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ADVICE = re.compile("Weights only load failed|Please file an issue|Check the documentation")
"""Boilerplate in torch's error when it refuses to unpickle an object."""

ENTRY_TYPES = {
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
"""Errors that reading a damaged file or another kind of file may raise."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not belong to the method or network it is loaded into."""


def load_checkpoint(path: str | Path) -> Any:
    """Reads a file written by `torch.save`; unpickles only tensors and plain values.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch does not verify its checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
        with torch.serialization.safe_globals([Namespace]):  # options of a command line, in some released files
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors (truncated, or contains code): {_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """First sentence of an error, without torch's advice to unpickle the file unsafely."""
    lines = [line for line in str(error).splitlines() if line and not ADVICE.search(line)]
    return lines[0].split(". ")[0] if lines else type(error).__name__


def save_checkpoint(content: Any, path: str | Path) -> None:
    """Writes a file for `load_checkpoint` atomically: a reader sees all of it or none, even after a power cut.

    Raises:
        OSError: If it cannot be written; a previous file of that name is unchanged.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")  # overwrites a leftover of a killed process
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
        kept = f"the previous checkpoint is intact: {path}" if path.is_file() else "there is no previous one"
        size = f"{buffer.getbuffer().nbytes / 2**20:,.1f} MiB"
        raise OSError(
            f"the checkpoint {path} ({size}) cannot be written ({error.strerror}); {kept}; free disk space or make "
            "the folder writable, then resume with `python -m benchmark fit --ckpt_path last`"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_suite(path: str | Path, *needed: str) -> dict[str, Any]:
    """Reads a checkpoint that the suite wrote during training or import.

    Args:
        path: The file.
        needed: Required entries besides the weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
        CheckpointMismatchError: If it is not of the suite.
    """
    content = load_checkpoint(path)
    if not isinstance(content, dict) or not {"state_dict", *needed} <= content.keys():
        raise CheckpointMismatchError(
            f"{path} is not a checkpoint of the suite; convert an authors' file with `python -m benchmark import` first"
        )
    wrong = [
        f"{key} is not a {entry_type.__name__}"
        for key, entry_type in ENTRY_TYPES.items()
        if key in content and not isinstance(content[key], entry_type)
    ]
    if not wrong:
        wrong = [
            f"{key} is not a tensor" for key, value in content["state_dict"].items() if not isinstance(value, Tensor)
        ]
    if wrong:
        raise CheckpointMismatchError(f"{path} is malformed: {', '.join(wrong[:5])}; train or download it again")
    return content


def network_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the network's weights from a checkpoint."""
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
    """Checks that a checkpoint belongs to a method, if it records one.

    Raises:
        CheckpointMismatchError: If it belongs to another one.
    """
    found = checkpoint.get("method", method)
    if found == "sdit" and "network.position" in checkpoint.get("state_dict", ()):  # its name before SDiT's release
        found = "spiking-rwkv"
    if found != method:
        raise CheckpointMismatchError(
            f"{source} is of method {found!r}, expected {method!r}; give a checkpoint of {method!r}, or the "
            f"configuration of {found!r}"
        )


def rename(state: Mapping[str, Tensor], name: Callable[[str], str]) -> dict[str, Tensor]:
    """Renames the tensors of a state dict.

    Raises:
        CheckpointMismatchError: If two would get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if name(key) in renamed:
            raise CheckpointMismatchError(f"the official checkpoint has two tensors {name(key)}, one named {key}")
        renamed[name(key)] = value
    return renamed


def check_state(state: Mapping[str, Tensor], network: nn.Module, source: str) -> None:
    """Checks that a state dict has exactly the tensors of a network.

    Args:
        state: Tensors by name.
        network: Network to load them into.
        source: Description of the state, for the message.

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
            f"{len(names)} {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for problem, names in problems.items()
            if names
        )
        raise CheckpointMismatchError(
            f"{source} does not fit the configured network ({listing}); use the configuration it was trained with, "
            "for a run of the suite the config.yaml in its folder"
        )
