from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from leaderboard.evaluation import cost
from leaderboard.evaluation.chunks import Chunks, GenerationStats, generation_key
from leaderboard.evaluation.cost import Counts
from leaderboard.files import file_sha256
from systems import SDDPM
from systems.networks import spiking_unet
from systems.ops.kernels import neurons

IMAGES = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STATS = GenerationStats(3, 1.5, 1000, Counts({"conv": [9, 0.1, 2.0, 3.0, 9]}, {"neuron": [4.0, 18, 6, 18]}, "conv"))


def test_batch_survives_exactly(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "new")
    assert chunks.read(250, 3) is None
    chunks.write(250, IMAGES, IMAGES, STATS)
    found = chunks.read(250, 3)
    assert found is not None
    assert torch.equal(found[0], IMAGES)
    assert found[1] is found[0]
    assert found[2] == STATS
    assert chunks.count == 1
    assert chunks.read(0, 3) is None


def test_floats_survive_exactly(tmp_path: Path) -> None:
    pixels = torch.randn(IMAGES.shape)
    Chunks(tmp_path).write(0, IMAGES, pixels, STATS)
    found = Chunks(tmp_path).read(0, 3)
    assert found is not None
    assert torch.equal(found[0], IMAGES)
    assert torch.equal(found[1], pixels)


def test_batch_of_another_length_is_generated_again(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path)
    chunks.write(0, IMAGES, IMAGES, STATS)
    assert chunks.read(0, 4) is None


@pytest.mark.parametrize("kept", [0, 1, 100, -300, -1])
def test_truncated_file_warns_and_is_replaced(tmp_path: Path, kept: int) -> None:
    chunks = Chunks(tmp_path)
    chunks.write(0, IMAGES, IMAGES, STATS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.warns(UserWarning, match=r"chunk-00000000\.npz is damaged .* its images are generated again"):
        assert chunks.read(0, 3) is None
    chunks.write(0, IMAGES, IMAGES, STATS)
    assert chunks.read(0, 3) is not None


def test_no_flipped_byte_changes_what_is_read(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path)
    pixels = IMAGES / 2
    chunks.write(0, IMAGES, pixels, STATS)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with warnings.catch_warnings(action="ignore"):
            found = chunks.read(0, 3)
        assert found is None or (
            torch.equal(found[0], IMAGES) and torch.equal(found[1], pixels) and found[2] == STATS
        ), place
        refused += found is None
    assert refused > len(content) / 14  # the other flips hit dates and similar fields of the archive's headers


def test_clear_deletes_only_its_own_files(tmp_path: Path) -> None:
    mine, other = Chunks(tmp_path / "evaluation" / "a"), Chunks(tmp_path / "evaluation" / "b")
    for chunks in (mine, other):
        chunks.write(0, IMAGES, IMAGES, STATS)
    mine.clear()
    assert (mine.count, other.count) == (0, 1)
    other.clear()
    assert list(tmp_path.iterdir()) == []
    other.clear()  # a second call is not an error


def test_stats_add_up() -> None:
    total = GenerationStats() + STATS
    total += replace(STATS, peak_memory_bytes=None) + replace(STATS, peak_memory_bytes=2000)
    assert (total.images, total.seconds, total.peak_memory_bytes) == (9, 4.5, 2000)
    assert total.counts.neurons == {"neuron": [12.0, 54, 18, 54]}
    assert (GenerationStats() + GenerationStats()).peak_memory_bytes is None
    assert STATS.over_processes() is STATS  # there is only one


DATA = SimpleNamespace(
    name="digits", image_shape=(1, 8, 8), native_size=8, fit="pad", sample_seed=0, sample_batch_size=25, num_samples=60
)


def key(
    system: Any = SDDPM, data: Any = DATA, checkpoint: str = "a" * 64, model: Any = None, **environment: str
) -> str:
    model = {"init_args": {"num_steps": 4}} if model is None else model
    return generation_key(object.__new__(system), data, checkpoint, model, {"precision": "32-true"} | environment)


def test_key_depends_on_everything_that_images_depend_on(tmp_path: Path) -> None:
    keys = [
        key(),
        key(checkpoint="b" * 64),
        key(model={"init_args": {"num_steps": 8}}),
        key(precision="bf16-mixed"),
        key(hardware="another"),
        *(
            key(data=SimpleNamespace(**vars(DATA) | change))
            for change in (
                {"name": "mnist"},
                {"image_shape": (1, 32, 32)},
                {"native_size": 28},
                {"fit": "resize"},
                {"sample_seed": 1},
                {"sample_batch_size": 50},
            )
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == key(data=SimpleNamespace(**vars(DATA) | {"num_samples": 99}))


def test_key_depends_on_files_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gamma = tmp_path / "gamma.pt"
    model = {"init_args": {"scheduler": [{"gamma": str(gamma)}], "note": "\0" + "x" * 5000}}
    keys = [key(model=model)]
    for text in ("1", "2"):
        gamma.write_text(text)
        keys.append(key(model=model))
    own = tmp_path / "own.py"
    for text in ("class Own: pass", "class Own: 'edited'"):
        own.write_text(text)
        monkeypatch.setattr("inspect.getfile", lambda kind: str(own))
        keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("module", [spiking_unet, neurons, cost], ids=lambda module: module.__name__)
def test_key_depends_on_the_source_of_networks_kernels_and_counts(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = Path(str(module.__file__))
    before = key()
    monkeypatch.setattr(
        "leaderboard.evaluation.chunks.file_sha256", lambda file: "edited" if file == edited else file_sha256(file)
    )
    assert key() != before
