from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import inception_v3

from leaderboard.extractors.base import InceptionExtractor, SmallExtractor
from leaderboard.extractors.inception import ResizedInception, TorchvisionInception, _bilinear, _clean, view_extractor
from leaderboard.protocols import DINOV2, OFFLINE_V1, PROTOCOLS, STANDARD_V1

Weights = dict[str, Path]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is not the published Inception file.*")]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 64, 64), (2, 1, 28, 28), (1, 3, 400, 400)])
def test_clean_resize_is_clean_fids(shape: tuple[int, ...]) -> None:
    from cleanfid.resize import build_resizer

    x = images(*shape)
    expected = [build_resizer("clean")(image.expand(3, -1, -1).permute(1, 2, 0).numpy()) for image in x]
    found = (_clean(x.float().expand(-1, 3, -1, -1)) * 128 + 128).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=0, atol=1e-4)  # differences are scaled by 128
    assert float(found.min()) == 0  # clipped, where the filter overshoots
    assert (found != found.round()).any()  # but not rounded


def test_bilinear_keeps_floats_as_they_are() -> None:
    x = torch.tensor([0.0, 127.5, 255.0, 300.0])[:, None, None, None].expand(-1, 3, 8, 8)
    assert _bilinear(x)[:, 0, 0, 0].tolist() == pytest.approx([-1, 0, 1, 600 / 255 - 1], abs=1e-6)
    corner = _bilinear(images(1, 3, 2, 2).float())[0, 0]
    assert float(corner[0, 0]) == float(corner[30, 30])  # half-pixel centres: the border is repeated


@pytest.mark.parametrize("resize", ["clean", "bilinear"])
def test_same_network_with_another_resize(random_weights: Weights, small_inception: int, resize: str) -> None:
    """Images of the network's input size are not resized."""
    ours = ResizedInception(str(random_weights["inception"]), resize)
    theirs = InceptionExtractor(str(random_weights["inception"]))
    x = images(3, 3, small_inception, small_inception)
    features, logits = ours(x)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip((features, logits), theirs(x), strict=True)]
    assert same == [resize == "clean"] * 2  # the other one scales to [-1, 1], not to [-1, 1)
    torch.testing.assert_close(ours(x.float())[0], features)
    small = images(3, 1, 28, 28)
    assert not torch.allclose(ours(small)[0], theirs(small)[0], atol=1e-4)


def test_only_networks_of_unquantised_protocols_take_floats(random_weights: Weights) -> None:
    with pytest.raises(ValueError, match="it expects uint8"):
        InceptionExtractor(str(random_weights["inception"]))(images(1, 1, 28, 28).float())
    with pytest.raises(ValueError, match="1 or 3 channels, found shape"):
        ResizedInception(str(random_weights["inception"]), "clean")(images(1, 2, 28, 28))


@pytest.mark.usefixtures("small_inception")
def test_torchvision_network_transforms_twice(random_weights: Weights) -> None:
    network = inception_v3(weights=None, transform_input=True, init_weights=False)
    network.load_state_dict(torch.load(random_weights["torchvision"], weights_only=True))
    network.eval()
    mixed: list[Tensor] = []
    network.Mixed_7c.register_forward_hook(lambda module, inputs, output: mixed.append(output))
    grey = images(2, 1, 28, 28)
    x = F.interpolate(grey.float().expand(-1, 3, -1, -1) / 255, (75, 75), mode="bilinear", align_corners=False)
    with torch.no_grad():
        network(2 * x - 1)
        network.transform_input = False
        logits = network(x)
    twice = TorchvisionInception(str(random_weights["torchvision"]), "twice")
    unit = TorchvisionInception(str(random_weights["torchvision"]), "unit")
    torch.testing.assert_close(twice(grey)[0], mixed[0].mean((2, 3)))
    torch.testing.assert_close(unit(grey)[1], logits)
    torch.testing.assert_close(unit(grey)[0], mixed[1].mean((2, 3)))
    assert twice(grey)[0].shape == (2, twice.num_features)
    assert not torch.allclose(twice(grey)[0], unit(grey)[0])


def test_every_view_has_its_extractor(random_weights: Weights) -> None:
    files = (str(random_weights["inception"]), str(random_weights["torchvision"]))
    found = {
        name: [view_extractor(v, "digits", *files) for v in p.views]
        for name, p in PROTOCOLS.items()
        if DINOV2 not in {view.extractor for view in p.views}
    }
    kinds = {name: [type(extractor) for extractor in extractors] for name, extractors in found.items()}
    assert kinds[STANDARD_V1.name] == [InceptionExtractor]
    assert kinds[OFFLINE_V1.name] == [SmallExtractor]
    assert kinds["paper-sddpm"] == kinds["paper-fsddim"] == [ResizedInception]
    assert kinds["paper-spiking-diffusion"] == [TorchvisionInception, TorchvisionInception, InceptionExtractor]
    assert [e.resize.__name__ for e in (*found["paper-sddpm"], *found["paper-fsddim"])] == ["_bilinear", "_clean"]
    assert [e.twice for e in found["paper-spiking-diffusion"][:2]] == [True, False]


def test_wrong_or_missing_torchvision_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(RuntimeError, match=r"cannot download .*0cc3c7bd\.pth .*--evaluation\.torchvision_weights PATH"):
        TorchvisionInception(None, "twice")
    with pytest.raises(FileNotFoundError, match=r"torchvision_weights=gone\.pth is not a file"):
        TorchvisionInception("gone.pth", "twice")
    for content in ({"weight": torch.zeros(1)}, [1]):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth does not contain weights of torchvision's inception_v3"):
            TorchvisionInception(str(tmp_path / "other.pth"), "twice")
