"""Damaged, foreign or hostile files and options end in an error of one line, without any other effect.

Each case runs the whole command line. Sources of images are tested in tests/datamodules/test_faulty_sources.py.
"""

from __future__ import annotations

import os
import pickle
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SDDPM, fit

from benchmark.callbacks.checkpointing import AtomicCheckpointIO
from systems.checkpoints import CheckpointMismatchError

pytestmark = pytest.mark.slow

QUICKSTART = Path("configs/quickstart.yaml").read_text()


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture(scope="module")
def run(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    return fit(tmp_path_factory.mktemp("good"), *SDDPM)


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail; returns its exit code and its one line."""

    def fail(*args: object) -> str:
        before = sorted(path for path in tmp_path.rglob("*"))
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("benchmark", run_name="__main__")
        assert sorted(path for path in tmp_path.rglob("*")) == before  # nothing was written, nothing made by a payload
        said = capsys.readouterr().err
        assert "Traceback" not in said
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert len(line) < 700
        return f"{stop.value.code} {line}"

    return fail


def truncated(good: Path) -> bytes:
    return good.read_bytes()[: good.stat().st_size // 2]


def flipped(good: Path) -> bytes:
    content = bytearray(good.read_bytes())
    content[-22] ^= 0xFF  # the offset of the archive's directory
    return bytes(content)


def bit_of_a_weight(good: Path) -> bytes:
    content = bytearray(good.read_bytes())
    weight = torch.load(good, weights_only=True)["state_dict"]["network.conv_identity.weight"]
    content[content.index(weight.numpy().tobytes()) + 3] ^= 0x40  # of an exponent
    return bytes(content)


def altered(**changes: Any) -> Callable[[Path], Any]:
    return lambda good: torch.load(good, weights_only=True) | changes


def reshaped(good: Path) -> Any:
    content = torch.load(good, weights_only=True)
    content["state_dict"] = {k: v[:1] if v.dim() > 1 else v for k, v in content["state_dict"].items()}
    return content


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "cannot be read as a checkpoint of tensors"),
    "flipped": (flipped, "cannot be read as a checkpoint of tensors"),
    "one bit of a weight": (bit_of_a_weight, "cannot be read as a checkpoint of tensors"),
    "empty": (lambda good: b"", "cannot be read as a checkpoint of tensors"),
    "text": (lambda good: b"<html>not found</html>", "cannot be read as a checkpoint of tensors"),
    "pickle with code": (
        lambda good: pickle.dumps({"state_dict": Harmful(good)}, 2),
        "besides them it contains posix.system",
    ),
    "checkpoint with code": (
        lambda good: {"state_dict": {"a": Harmful(good)}},
        "besides them it contains posix.system",
    ),
    "list": (
        lambda good: [1, 2],
        "is not a checkpoint of the suite; convert an authors' file with `python -m",
    ),
    "authors' file": (lambda good: {"net_model": {"a": torch.zeros(1)}}, "is not a checkpoint of the suite"),
    "no weights": (altered(state_dict=None), "is malformed: state_dict is not a dict"),
    "words for weights": (altered(state_dict={"network.a": "b"}), "is malformed: network.a is not a tensor"),
    "words for loops": (altered(loops="x"), "is malformed: loops is not a dict"),
    "number for method": (altered(method=7), "is malformed: method is not a str"),
    "another method": (altered(method="fsddim"), "is of method 'fsddim', expected 'sddpm'"),
    "another process": (altered(process={"beta_start": 1}), "was trained with num_train_timesteps=None but --model"),
    "another optimiser": (altered(optimizer_states=[{"state": {}, "param_groups": []}]), "parameter groups"),
    "another size": (reshaped, "does not fit the configured network"),
}


WHOLE_COMMAND = {"truncated", "checkpoint with code", *(case for case in CHECKPOINTS if case.startswith("another"))}
"""Cases that need more than the reader, which all commands share."""


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case: str, run: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    make, match = CHECKPOINTS[case]
    content = make(run / "checkpoints" / "last.ckpt" if "code" not in case else tmp_path / "executed")
    path = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    if case in WHOLE_COMMAND:
        said = error("fit", f"--config={run / 'config.yaml'}", f"--ckpt_path={path}")
        assert said.startswith("1 error: ")
        assert match in said
    else:
        with pytest.raises((ValueError, CheckpointMismatchError), match=re.escape(match)):
            AtomicCheckpointIO().load_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.ckpt"]


@pytest.mark.parametrize("command", [["import", "--method=sddpm"], ["convert"], ["activity", "--ckpt_path"]])
def test_code_in_a_checkpoint_runs_in_no_command(
    command: list[str], run: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    path = tmp_path / "checkpoints" / "bad.ckpt"
    path.parent.mkdir()
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    torch.save({"state_dict": {"a": Harmful(tmp_path / "executed")}}, path)
    assert "besides them it contains posix.system" in error(
        *command, path, *([tmp_path / "out.ckpt"] if command[0] == "import" else [])
    )


def with_value(value: Any, *keys: str) -> str:
    content = yaml.safe_load(QUICKSTART)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return yaml.safe_dump(content)


PAYLOAD = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "executed"]}}
MODEL = ("model", "init_args")
CONFIGS: dict[str, tuple[str | bytes, int, str]] = {
    "unknown section": (QUICKSTART + "colour: red\n", 2, "does not accept option 'colour'"),
    "unknown option": (with_value(1, *MODEL, "base_chanels"), 2, "Option 'base_chanels' is not accepted"),
    "wrong type": (with_value("many", *MODEL, "base_channels"), 2, "Expected a <class 'int'>. Got value: many"),
    "out of range": (with_value(-2, *MODEL, "num_steps"), 1, "num_steps=-2; give 1 or more"),
    "broken syntax": (
        QUICKSTART.replace("trainer:", "trainer: ["),
        1,
        "config.yaml is not YAML: while parsing a flow sequence",
    ),
    "tabs": (
        "trainer:\n\tmax_steps: 1\n",
        1,
        "config.yaml is not YAML: while scanning for the next token",
    ),
    "bytes": (bytes(range(256)), 1, "is not a text file in UTF-8"),
    "empty": ("", 2, "Unexpected config"),
    "list": ("- 1\n", 2, "Unexpected config"),
    "tag with code": ("model: !!python/object/apply:os.system ['touch executed']\n", 2, "could not determine a constr"),
    "class outside": (with_value(PAYLOAD, "model"), 2, "subprocess.Popen does not correspond to a subclass of Diff"),
    "function for a class": (with_value({"class_path": "os.system"}, "model"), 2, "os.system does not correspond"),
    "function for an optimiser": (with_value("os.system", *MODEL, "optimizer"), 2, "os.system"),
    "class for an optimiser": (with_value(PAYLOAD, *MODEL, "optimizer"), 2, "subprocess.Popen"),
    "class for a schedule": (with_value(PAYLOAD, *MODEL, "scheduler"), 2, "subprocess.Popen does not correspond"),
    "class for a callback": (with_value([PAYLOAD], "trainer", "callbacks"), 2, "subprocess.Popen does not correspond"),
    "function for a logger": (with_value({"class_path": "os.system"}, "trainer", "logger"), 2, "os.system does not"),
    "no such device": (
        with_value(0, "trainer", "devices"),
        1,
        "--trainer.devices=0 on the CPU; give a number of processes, 1 or more",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]) -> None:
    content, code, match = CONFIGS[case]
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    said = error("fit", f"--config={path}", "--trainer.max_steps=1")
    assert said.startswith(f"{code} error: ")
    assert match in said


def test_aliases_that_unfold_to_billions(tmp_path: Path, error: Callable[..., str]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 8)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert "has 63 aliases; write the values in their place" in error("fit", f"--config={tmp_path / 'config.yaml'}")


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["fit", "--config=../nowhere.yaml"], "2 error: .*File does not exist: '.*nowhere.yaml'"),
        (["fit", "--config=/"], "2 error: .*Path is not a file: '/'"),
        (["fit", "--ckpt_path=../nowhere.ckpt"], "1 error: --ckpt_path ../nowhere.ckpt is not a file"),
        (["fit", "--ckpt_path=/"], "1 error: run / has no 'last' checkpoint; it has: none"),
        (["test", "--trainer.default_root_dir=../nowhere"], "1 error: no run with a checkpoint under ../nowhere/"),
        (["fit", "--trainer.default_root_dir=a\0b", "--config=configs/quickstart.yaml"], "1 error: .*null byte"),
        (["fit", "--config=configs/sddpm_mnist.yaml", "--data.root=../../\x07"], "1 error: MNIST was not found: --da"),
        (["fit", "--config=configs/sddpm_mnist.yaml", "--data.root=a\0b"], "1 error: MNIST was not found: --data.ro"),
        (
            ["fit", "--config=configs/quickstart.yaml", "--data.cache_dir=/dev/null/x"],
            "1 error: the image cache can",
        ),
    ],
)
def test_paths(args: list[str], match: str, error: Callable[..., str]) -> None:
    said = error(*args, *(["--trainer.accelerator=cpu"] if args[0] == "fit" else []))
    assert re.match(match, said), said
