"""The metrics of `standard-v1` against torch-fidelity's own command line, on the same PNG files and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.fidelity import main

from leaderboard.extractors.base import InceptionExtractor
from leaderboard.metrics.generation import GenerationMetrics

pytestmark = pytest.mark.slow

COUNT = 40


def save_pictures(folder: Path, seed: int, colours: float) -> Tensor:
    """Writes blurred noise and returns it, uint8 `(N, 3, 32, 32)`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(COUNT, 3, 4, 4, generator=generator) * colours * 255
    pixels = torch.nn.functional.interpolate(noise, (32, 32), mode="bilinear").to(torch.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")
    return pixels


@pytest.mark.usefixtures("small_inception")
@pytest.mark.filterwarnings("ignore:.*is not the published Inception file.*")
def test_values_are_those_of_its_command_line(
    tmp_path: Path,
    random_weights: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, fake = save_pictures(tmp_path / "real", 1, 1.0), save_pictures(tmp_path / "fake", 2, 0.9)
    weights = str(random_weights["inception"])
    options = ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights]
    options += ["--kid-subsets", "1", "--kid-subset-size", str(COUNT), "--isc-splits", "1"]
    inputs = ["--input1", str(tmp_path / "fake"), "--input2", str(tmp_path / "real"), "--no-cache", "--save-cpu-ram"]
    monkeypatch.setattr(sys, "argv", ["fidelity", "--cpu", "--json", "-f", "-k", "-i", "-r", *inputs, *options])
    main()
    expected = json.loads(capsys.readouterr().out)
    families = {
        "fid": {},
        "kid": {"subsets": 1, "subset_size": COUNT, "seed": 0},
        "is": {"splits": 1},
        "precision_recall": {"neighbours": 3},
    }
    metrics = GenerationMetrics(InceptionExtractor(weights), families, COUNT, num_groups=2)
    for index in torch.arange(COUNT).split(16):
        metrics.update_reference(real[index], index)
        metrics.update_generated(fake[index], index)
    with pytest.warns(UserWarning, match="degrees of freedom"):  # one split has no spread
        found = {key: value.value for key, value in metrics.compute().items()}
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["kid_mean"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found["is_mean"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < found["precision"] < 1
