"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SHARED = Path(__file__).parents[2] / "shared"

# One thread, here and in the processes that tests start: threads of a pool do not survive a fork.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
# Autograd detects devices once, in its first backward pass. After a compilation it finds one and starts threads, and
# forked processes (tests of killed runs) cannot differentiate then. So the first backward pass runs here.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--kills`."""
    parser.addoption("--kills", type=int, default=2, help="kills of each kind of process at random moments")


TRAINING_FIXTURES = {"run", "runs", "trained"}
"""Fixtures that train a network, so that every test that uses one is slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests as slow by their fixtures; other slow tests and modules carry the mark themselves."""
    for item in items:
        if not TRAINING_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, Tensor]]:
    """Loads a file of recorded reference numbers, or skips the test if it is not available."""

    def load(name: str) -> dict[str, Tensor]:
        path = SHARED / "methods" / "reference" / name
        if not path.exists():
            pytest.skip(f"reference vectors {name} are not available here")
        return load_file(path)

    return load


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """Turns compilation off, which takes longer than the smallest trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("systems.ops.compiled.COMPILE_FROM", 2**62)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images in parquet; skips the test if it is not available."""
    path = SHARED / "data"
    if not path.exists():
        pytest.skip("the folder of real images is not available here")
    return path


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Cache of the real images, which all processes of the tests share."""
    folder = tmp_path_factory.getbasetemp()
    return str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "real")


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of random weights in the form of the published ones: `inception` (2015) and `torchvision`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchvision.models import inception_v3

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        networks: dict[str, nn.Module] = {
            "inception": FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none"),
            "torchvision": inception_v3(weights=None, init_weights=False),
        }
        folder = tmp_path_factory.mktemp("weights")
        for name, network in networks.items():
            for module in network.modules():
                if isinstance(module, nn.Conv2d):  # so that different images have different features
                    nn.init.kaiming_normal_(module.weight)
            torch.save(network.state_dict(), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in networks}


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch) -> int:
    """Reduces the input of every Inception network from 299x299 to 75x75 pixels, its minimum: 16 times faster."""
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr("leaderboard.extractors.inception.SIZE", 75)
    return 75
