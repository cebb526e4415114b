"""Checkpoint files: read without executing code, checked against a network, written atomically."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

HARMLESS: list[Any] = [
    Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("?", *np.typecodes["AllInteger"], *np.typecodes["AllFloat"])),
    *(
        (value.__reduce__()[0], f"{module}.multiarray.{name}")
        for value, name in ((np.float64(0), "scalar"), (np.zeros(0), "_reconstruct"))
        for module in ("numpy._core", "numpy.core")  # of numpy 2 and 1
    ),
]
"""Objects beside the weights in many files: options of a command line, and numbers and arrays of numpy."""

ADVICE = re.compile("Weights only load failed|Please file an issue|Check the documentation")
"""Boilerplate in torch's error when it refuses to unpickle an object."""

ENTRY_TYPES = {
    "state_dict": dict,
    "pytorch-lightning_version": str,
    "method": str,
    "process": dict,
    "configuration": dict,
    "training_data": list,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Types of the entries of the suite's checkpoints."""
UNKNOWN_DATA: Mapping[str, Any] = {"name": "unknown"}
"""Training data of weights of unknown origin: imported ones, and those of versions that did not store it."""


UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    zipfile.BadZipFile,
    SafetensorError,
)
"""Errors that reading a damaged file or another kind of file may raise."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not belong to the method or network it is loaded into."""


EXPORTED = ("method", "process", "training_data", "configuration", "activation_bits", "norm_groups", "gamma")
"""Entries of a checkpoint that its safetensors file keeps besides the weights, as JSON in its metadata."""


_HALF = "float16"
"""Entry `precision` in the metadata of a safetensors file whose weights were rounded."""


def save_safetensors(content: Mapping[str, Any], path: Path, half: bool = False) -> None:
    """Writes the weights of a checkpoint and its `EXPORTED` entries to a safetensors file for `load_checkpoint`.

    Args:
        content: Checkpoint.
        path: File to write.
        half: Whether numbers of 32 bits are rounded to 16; `load_checkpoint` returns them with 32 bits.

    Raises:
        ValueError: If a number is too large for 16 bits; nothing is written.
    """
    kept = {name: content[name] for name in EXPORTED if name in content}
    metadata = {"format": "pt", "checkpoint": json.dumps(kept, default=_tensor_to_json)}
    state = {name: tensor.contiguous() for name, tensor in content["state_dict"].items()}
    if half:
        metadata["precision"] = _HALF
        state = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
        if large := [name for name, t in state.items() if t.dtype == torch.float16 and not t.isfinite().all()]:
            raise ValueError(
                f"{', '.join(large[:5])} has numbers beyond {torch.finfo(torch.float16).max:g}, the largest one of 16 "
                "bits; export in full precision"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(save(state, metadata))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Reads a safetensors file: a whole checkpoint if `save_safetensors` wrote it, else a plain state dict."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
    text = metadata.get("checkpoint")
    if metadata.get("precision") == _HALF:
        state = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in state.items()}
    return state if text is None else json.loads(text, object_hook=_tensor_from_json) | weights_only(state)


def _tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    return {"tensor": tensor.tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _tensor_from_json(value: dict[str, Any]) -> Any:
    if value.keys() != {"tensor", "dtype"}:
        return value
    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))


def weights_only(state: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the checkpoint of an untrained run with these weights."""
    return {
        "state_dict": state,
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def load_checkpoint(path: str | Path) -> Any:
    """Reads a file written by `torch.save` or in safetensors; unpickles only tensors, plain values and numbers.

    A safetensors file of `save_safetensors` is a whole checkpoint, any other a plain state dict.


    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or contains other objects; names them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        if zipfile.is_zipfile(path):  # torch does not verify its checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if objects := _refused(path, error):
            raise ValueError(
                f"{path} cannot be read as a checkpoint of tensors: besides them it contains {', '.join(objects[:5])}"
                f"{', ...' if len(objects) > 5 else ''}, and unpickling these could run code; if you trust the file, "
                "save only its weights with the authors' code: torch.save(model.state_dict(), FILE)"
            ) from None
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors (truncated, or contains code): {_reason(error)}"
        ) from None


def _refused(path: Path, error: Exception) -> list[str]:
    """Names of the classes and functions in a file that are not unpickled."""
    if not (first := re.search(r"GLOBAL ([\w.]+)", str(error))):
        return []
    try:
        with torch.serialization.safe_globals(HARMLESS):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE:  # the format before torch 1.6
        found = []
    return sorted(found) or [first[1]]


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
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        content = weights_only(content)  # a bare state dict
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


def with_network_prefix(state: dict[str, Tensor], system: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a system, given that of the system or that of its network only."""
    prefix = "network."
    if any(key.startswith(prefix) for key in state) or not any(k.startswith(prefix) for k in system.state_dict()):
        return state
    return {f"{prefix}{key}": value for key, value in state.items()}


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


def training_data_of(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the data that a checkpoint was trained on, oldest first; `UNKNOWN_DATA` if it does not say."""
    return list(checkpoint.get("training_data") or [dict(UNKNOWN_DATA)])


def with_training_data(history: list[dict[str, Any]], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a list of training data with one more entry, unless it is there."""
    return history if data in history else [*history, dict(data)]


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
