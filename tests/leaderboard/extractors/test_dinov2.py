"""DINOv2 with random weights: a tiny network takes the place of the real one in torch.hub's folder."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from leaderboard.extractors.dinov2 import WIDTH, DinoV2Extractor
from leaderboard.extractors.inception import view_extractor
from leaderboard.metrics.generation import GenerationMetrics
from leaderboard.protocols import DINOV2, STANDARD_V2

HUBCONF = """
import torch

dependencies = ["torch"]


def dinov2_vitl14(pretrained=True):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, 1024))
    if pretrained:
        network.load_state_dict(torch.load(torch.hub.get_dir() + "/checkpoints/dinov2_vitl14_pretrain.pth"))
    return network
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub folder with code and random weights, and no network."""

    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", fail)
    (tmp_path / "facebookresearch_dinov2_main").mkdir()
    (tmp_path / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(1)
    layer = torch.nn.Linear(48, WIDTH)
    state = {"2.weight": layer.weight.detach(), "2.bias": layer.bias.detach()}
    torch.save(state, tmp_path / "checkpoints" / "dinov2_vitl14_pretrain.pth")
    return tmp_path


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_local_weights_are_used_and_hashed(hub: Path) -> None:
    extractor = DinoV2Extractor()
    features, logits = extractor(images(3, 0))
    state = torch.load(hub / "checkpoints" / "dinov2_vitl14_pretrain.pth")
    assert torch.equal(extractor.network.model[2].weight, state["2.weight"])
    assert features.shape == (3, WIDTH)
    assert logits.shape == (3, 0)
    assert extractor.sha256 == DinoV2Extractor().sha256
    state["2.bias"] += 1
    torch.save(state, hub / "checkpoints" / "dinov2_vitl14_pretrain.pth")
    assert extractor.sha256 != DinoV2Extractor().sha256
    with pytest.raises(ValueError, match=r"3 channels, found shape \(2, 1, 28, 28\)"):
        extractor(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))


@pytest.mark.usefixtures("hub")
def test_metrics_of_standard_v2_on_colour_images() -> None:
    (dino,) = (view for view in STANDARD_V2.views if view.extractor == DINOV2)
    assert dino.metrics_for("mnist") == {}
    extractor = view_extractor(dino, "cifar10")
    metrics = GenerationMetrics(extractor, dino.metrics_for("cifar10"), num_reference=40, num_groups=2, kept_images=40)
    metrics.update_reference(images(40, 1), torch.arange(40))
    metrics.update_generated(images(30, 2), torch.arange(30))
    keys = {"fd_dinov2", "fd_unbiased_dinov2", "kd_dinov2", "density_dinov2", "coverage_dinov2"}
    assert set(metrics.compute()) == keys


def test_without_network_or_files_the_error_says_where_they_go(hub: Path) -> None:
    (hub / "facebookresearch_dinov2_main" / "hubconf.py").unlink()
    (hub / "facebookresearch_dinov2_main").rmdir()
    with pytest.raises(RuntimeError, match=r"cannot load DINOv2 .*facebookresearch_dinov2_main and its .*offline-v3"):
        DinoV2Extractor()
