"""Files that people have instead of a plain state dict are read if harmless, otherwise refused by name."""

from __future__ import annotations

import argparse
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmark.commands.import_checkpoint import _state
from systems.checkpoints import load_checkpoint, read_suite
from systems.diffusion.analytic_dpm import read_gamma

WEIGHTS = {"conv.weight": torch.arange(6.0).view(2, 3), "norm.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True), np.float16(0.5), np.uint8(7), np.arange(3.0)],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_numpy_beside_the_weights_are_read(value: Any, tmp_path: Path) -> None:
    torch.save({"net_model": WEIGHTS, "best": value}, tmp_path / "a.pt")
    content = load_checkpoint(tmp_path / "a.pt")
    assert np.array_equal(content["best"], value)
    assert _state(content, "a.pt").keys() == WEIGHTS.keys()
    assert np.dtype not in torch.serialization.get_safe_globals()  # allowed for this file only


def test_numbers_written_by_numpy_1_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "best": np.float64(1.5)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "b.pt").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "b.pt").write_bytes(old)
    assert b"numpy._core" not in old
    assert load_checkpoint(tmp_path / "b.pt")["best"] == 1.5


def test_options_of_a_command_line_beside_the_weights_are_read(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt")["args"].lr == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_are_named(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content = {"net_model": WEIGHTS, "args": Fraction(1, 3)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"besides them it contains fractions\.Fraction, and unpickling") as error:
        load_checkpoint(path)
    assert "weights_only" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict\(\), FI"):
        load_checkpoint(tmp_path / "a.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path)
    assert _state(load_checkpoint(path), "a").keys() == WEIGHTS.keys()
    assert read_suite(path)["state_dict"].keys() == WEIGHTS.keys()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of tensors"):
        load_checkpoint(path)


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in (state or WEIGHTS).items()}


OTHER = {key: torch.zeros_like(value) for key, value in WEIGHTS.items()}
LAYOUTS: dict[str, Any] = {
    "plain": WEIGHTS,
    "state_dict": {"state_dict": WEIGHTS, "epoch": 3},
    "DataParallel": {"net_model": prefixed("module.")},
    "DataParallel of DataParallel": {"net_model": prefixed("module.module.")},
    "compiled": {"model_state_dict": prefixed("_orig_mod.")},
    "compiled, DistributedDataParallel": {"model": prefixed("module._orig_mod.")},
    "compiled part": {"conv._orig_mod.weight": WEIGHTS["conv.weight"], "norm.bias": WEIGHTS["norm.bias"]},
    "Lightning": {"state_dict": prefixed("model."), "pytorch-lightning_version": "2", "loops": {}},
    "Lightning with averaged weights": {"state_dict": prefixed("model.", OTHER) | prefixed("ema.")},
    "AveragedModel": {"state_dict": {"n_averaged": torch.tensor(5)} | prefixed("module.")},
    "ema_pytorch": {
        "ema": prefixed("online_model.", OTHER)
        | prefixed("ema_model.")
        | {"initted": torch.ones(1), "step": torch.ones(1)},
        "model": OTHER,
    },
    "averaged weights first": {"net_model": OTHER, "ema_model": WEIGHTS},
    "no averaged weights": {"ema": {"decay": 0.99}, "state_dict": WEIGHTS},
    "nested": {"state_dict": {"model": WEIGHTS, "optimizer": {"lr": 1}}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_files_give_the_same_weights(layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout], tmp_path / "a.pt")
    state = _state(load_checkpoint(tmp_path / "a.pt"), "a.pt")
    assert state.keys() == WEIGHTS.keys()
    assert all(torch.equal(state[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "contains no state dict; expected one of"),
        ({}, "contains no state dict; expected one of"),
        ({"state_dict": {"a": torch.ones(1), "b": "x"}}, "contains no state dict in state_dict: b is not a tensor"),
        ({"optimizer": {"lr": 1}, "epoch": 1}, "contains no state dict: optimizer, epoch are not tensors"),
        (
            {"method": "sddpm", "state_dict": WEIGHTS, "pytorch-lightning_version": "2"},
            "is a checkpoint of the suite already; use it as --ckpt_path a.pt",
        ),
    ],
)
def test_other_contents_are_refused(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _state(content, "a.pt")


def test_gamma_is_read_by_the_same_reader(tmp_path: Path) -> None:
    torch.save({"gamma": torch.arange(3.0)}, tmp_path / "a.pt")
    assert read_gamma(tmp_path / "a.pt").tolist() == [0, 1, 2]
    torch.save({"gamma": torch.arange(3.0), "args": Fraction(1, 3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"fractions\.Fraction"):
        read_gamma(tmp_path / "a.pt")
