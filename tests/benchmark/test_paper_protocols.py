"""Every protocol from the command line: a small network, a few made-up digits, Inception with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmark.cli import main
from leaderboard.evaluation.callback import quantise
from leaderboard.extractors.base import Extractor
from leaderboard.extractors.inception import view_extractor
from leaderboard.record.records import Record, read_record

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the published Inception file.*")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST-like images in `data` and a run of one step in `runs`."""
    folder = tmp_path_factory.mktemp("protocols")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / "data" / split / "1").mkdir(parents=True)
        for k in range(24):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / split / "1" / f"{k:02d}.png")
    main(
        [
            "fit",
            "--config=configs/sddpm_mnist.yaml",
            f"--trainer.default_root_dir={folder / 'runs'}",
            "--trainer.max_steps=1",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--monitor.every_n_epochs=0",
            "--model.base_channels=4",
            "--model.channel_mult=[1,2]",
            "--model.num_res_blocks=1",
            "--model.num_inference_steps=2",
            "--data.val_size=0",
            "--data.batch_size=4",
            f"--data.root={folder / 'data'}",
            f"--data.cache_dir={folder / 'cache'}",
        ]
    )
    return folder


class Narrow(Extractor):
    """Some features of a network, so that their covariances are small."""

    dtypes = (torch.uint8, torch.float32)

    def __init__(self, whole: Extractor) -> None:
        super().__init__(whole.name, 8, whole.num_classes, whole.sha256)
        self.whole = whole

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.whole(images)
        return features[:, : self.num_features], logits


@pytest.fixture
def measure(
    trained: Path, random_weights: dict[str, Path], small_inception: int, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Record]:
    """Tests the run under a protocol and returns the record."""
    monkeypatch.setattr(
        "leaderboard.evaluation.reference.view_extractor", lambda *given: Narrow(view_extractor(*given))
    )

    def test(protocol: str, *options: str) -> Record:
        before = set(trained.glob("runs/*/records/*.json"))
        given = [f"--evaluation.{name}_weights={path}" for name, path in random_weights.items()]
        run = [f"--trainer.default_root_dir={trained / 'runs'}", f"--evaluation.protocol={protocol}"]
        main(["test", "--draft", "--data.num_samples=20", *run, *given, *options])
        (path,) = set(trained.glob("runs/*/records/*.json")) - before
        return read_record(path)

    return test


RESIZED = ("--data.image_size=32", "--data.fit=resize")
NATIVE = ("--data.image_size=null", "--data.fit=pad")


@pytest.mark.parametrize(
    ("protocol", "geometry", "metrics", "extractor"),
    [
        ("standard-v1", NATIVE, {"fid", "kid_mean", "precision", "recall"}, "inception-v3-compat"),
        ("paper-sddpm", RESIZED, {"fid", "fid_newton_schulz"}, "inception-v3-compat"),
        ("paper-fsddim", RESIZED, {"fid"}, "inception-v3-compat"),
        (
            "paper-spiking-diffusion",
            NATIVE,
            {"fid_svd", "is_torchvision", "kid_mean"},
            "torchvision + inception-v3-compat",
        ),
    ],
)
def test_every_protocol_leaves_a_record(
    trained: Path,
    measure: Callable[..., Record],
    protocol: str,
    geometry: tuple[str, ...],
    metrics: set[str],
    extractor: str,
) -> None:
    record = measure(protocol, *geometry)
    assert (record.draft, record.protocol.name, record.extractor.name) == (True, protocol, extractor)
    assert set(record.metrics) == metrics
    assert {value.num_samples for value in record.metrics.values()} == {20}
    assert all(value.uncertainty >= 0 for value in record.metrics.values())
    assert str(trained.parent) not in json.dumps(asdict(record))  # nothing of this machine
    options = record.config["data"]["init_args"]
    assert (record.dataset.source, options["root"], options["cache_dir"]) == (
        "image folder .../data (a subset: 24 of 60,000 train, 24 of 10,000 test images)",
        ".../data",
        ".../cache",
    )


def test_other_weights_than_the_published_make_a_draft(trained: Path, random_weights: dict[str, Path]) -> None:
    given = f"--evaluation.inception_weights={random_weights['inception']}"
    with pytest.raises(
        ValueError, match=r"its weights of inception-v3-compat have the SHA-256 6726825d\.\.\., not .*--draft"
    ):
        main(["test", f"--trainer.default_root_dir={trained / 'runs'}", *NATIVE, given])


def test_small_extractor_has_no_place_beside_inception(trained: Path) -> None:
    given = ["--evaluation.protocol=standard-v1", "--evaluation.extractor=x"]
    with pytest.raises(ValueError, match=r"standard-v1 has its own extractor; leave out --evaluation\.extractor"):
        main(["test", "--draft", f"--trainer.default_root_dir={trained / 'runs'}", *given])


def test_quantisation() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5])
    assert quantise(x, "round").tolist() == [0, 0, 128, 255, 255, 255]
    assert quantise(x, "truncate").tolist() == [0, 0, 127, 254, 255, 255]
    assert quantise(x, "none").tolist() == pytest.approx([-63.75, 0, 127.5, 254.8725, 255, 318.75])
    assert quantise(x, "none").dtype == torch.float32
