from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import FMNIST
from leaderboard.metrics.fad import (
    AUTOENCODERS,
    FADEncoder,
    FrechetAutoencoderDistance,
    add_reference_statistics,
    load_encoder,
    to_encoder_input,
)
from leaderboard.metrics.streaming import FrechetDistance

pytestmark = pytest.mark.slow

Reference = Callable[[str], dict[str, Tensor]]
Update = Callable[[Tensor, Tensor], None]


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("fad.safetensors")


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Path:
    return shared_data.parent / "fad"


@pytest.fixture(scope="module")
def real_images(shared_data: Path, real_cache: str) -> Tensor:
    """The test split of Fashion-MNIST, uint8 `(10000, 1, 28, 28)`."""
    data = FMNIST(root=str(shared_data / "fmnist"), cache_dir=real_cache)
    return torch.cat(list(data.reference_batches("test")))


def between(metric: FrechetDistance, features: Iterator[Tensor]) -> float:
    start = 0
    for part in features:
        metric.update(part, torch.arange(start, start + len(part)), real=False)
        start += len(part)
    return float(metric.compute()[0, 0])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_encoder_reproduces_recorded_latents(recorded: dict[str, Tensor], mode: str) -> None:
    state = {k.removeprefix("ae.state."): v for k, v in recorded.items() if k.startswith("ae.state.")}
    encoder = FADEncoder(1, 64).train(mode == "train")
    encoder.load_state_dict({k: v for k, v in state.items() if k.startswith(("encoder.", "latent_layer."))})
    with torch.no_grad():
        latent = encoder(recorded["ae.input"])
    torch.testing.assert_close(latent, recorded[f"ae.latent.{mode}"], rtol=0, atol=1e-5)
    assert torch.equal(encoder.encoder[0][1].running_mean, state["encoder.0.1.running_mean"])


def test_preprocessing_and_features_are_those_recorded(
    recorded: dict[str, Tensor], published: Path, real_images: Tensor
) -> None:
    x = to_encoder_input(real_images[:256])
    torch.testing.assert_close(x[:8], recorded["fashion.test32.first8"], rtol=0, atol=1e-6)
    fad = FrechetAutoencoderDistance("fmnist", published, num_groups=10)
    for train, key in ((True, "train_bn"), (False, "eval_bn")):
        expected = recorded[f"fashion.test.{key}.latent_first8"]
        torch.testing.assert_close(fad.features(x, train)[:8], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", ["", "_noise01", "_noise01_clamped"])
def test_reproduces_recorded_distances(
    recorded: dict[str, Tensor], published: Path, real_images: Tensor, noise: str
) -> None:
    x = to_encoder_input(real_images)
    if noise:
        x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        x = x.clamp(-1, 1) if noise.endswith("clamped") else x
    fad = FrechetAutoencoderDistance("fmnist", published, num_groups=10)
    own = FrechetDistance(64)
    add_reference_statistics(own, recorded["fashion.test.eval_bn.mu"], recorded["fashion.test.eval_bn.sigma"], 10_000)
    name = f"fad.test{noise or '_split'}"
    for metric, train, batch, key in (
        (fad.published, True, 256, "train_bn.bs256_seq.vs_published"),
        (FrechetAutoencoderDistance("fmnist", published, 10).published, True, 250, "train_bn.bs250_seq.vs_published"),
        (own, False, 250, "eval_bn.vs_eval_test_stats"),
    ):
        value = between(metric, (fad.features(part, train) for part in x.split(batch)))
        assert value == pytest.approx(float(recorded[f"{name}.{key}"]), abs=2e-5), key


def test_streamed_images_give_both_distances(recorded: dict[str, Tensor], published: Path, real_images: Tensor) -> None:
    fad = FrechetAutoencoderDistance("fmnist", published, num_groups=10)
    for start in range(0, 10_000, 700):  # not a multiple of the batch size of batch norm
        images = real_images[start : start + 700]
        fad.update_reference(images, torch.arange(start, start + len(images)))
        fad.update_generated(images, torch.arange(start, start + len(images)))
    assert len(fad._pending) == 0
    values = fad.compute()
    expected = float(recorded["fad.test_split.train_bn.bs250_seq.vs_published"])
    assert values["fad_published"].value == pytest.approx(expected, abs=2e-5)
    assert values["fad_eval"].value == pytest.approx(0, abs=1e-6)
    assert 0 < values["fad_published"].uncertainty < 0.05
    assert {value.num_samples for value in values.values()} == {10_000}
    assert "autoencoder fashion_64.pth (234f4335), batch statistics of 250 images" in values["fad_published"].note


def published_layout(tmp_path: Path, width: int = 64) -> Path:
    """Returns a folder with the published layout, random weights and statistics of `width` features."""
    for name in ("stat_checkpoints", "stats"):
        (tmp_path / name).mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(FADEncoder(1, 64).state_dict(), tmp_path / "stat_checkpoints" / "mnist_64.pth")
    np.savez(tmp_path / "stats" / "mnist_test_64.npz", mu=np.zeros(width), sigma=np.eye(width))
    return tmp_path


def test_values_do_not_depend_on_the_batch_size_of_the_sampler(tmp_path: Path) -> None:
    images = torch.randint(256, (520, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def values(size: int) -> dict:
        fad = FrechetAutoencoderDistance("mnist", folder, num_groups=10)
        fad.update_reference(images, torch.arange(520))
        for index in torch.arange(520).split(size):
            fad.update_generated(images[index], index)
        return fad.compute()

    folder = published_layout(tmp_path)
    first, other = values(520), values(33)
    for key in first:
        assert other[key].value == pytest.approx(first[key].value, rel=1e-5, abs=1e-6)


def test_statistics_equal_the_images_they_come_from() -> None:
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    by_images, by_statistics = FrechetDistance(5), FrechetDistance(5)
    by_images.update(features, torch.arange(300), real=True)
    add_reference_statistics(by_statistics, features.mean(0), features.T.cov(), 300)
    for name in ("reference_sum", "reference_outer", "reference_count"):
        torch.testing.assert_close(getattr(by_statistics, name), getattr(by_images, name))


def test_few_images_are_noted(tmp_path: Path) -> None:
    fad = FrechetAutoencoderDistance("mnist", published_layout(tmp_path), num_groups=2)
    images = torch.randint(256, (30, 1, 32, 32), dtype=torch.uint8)
    fad.update_reference(images, torch.arange(30))
    fad.update_generated(images, torch.arange(30))
    assert "singular covariance: only 30 generated images for 64 features" in fad.compute()["fad_eval"].note


@pytest.mark.parametrize("key", ["fad_published", "fad_eval", "fad_unbiased"])
def test_only_the_values_of_the_protocol_are_computed(tmp_path: Path, key: str) -> None:
    fad = FrechetAutoencoderDistance("mnist", published_layout(tmp_path), num_groups=2, keys=(key,))
    images = torch.randint(256, (30, 1, 32, 32), dtype=torch.uint8)
    assert (fad.reference_metrics() == {}) == (key == "fad_published")
    fad.update_reference(images, torch.arange(30))
    fad.update_generated(images, torch.arange(30))
    assert set(fad.compute()) == {key}


@pytest.mark.parametrize("dataset", ["cifar10", "celeba"])
def test_coloured_images_are_measured_against_the_published_statistics(
    dataset: str, tmp_path: Path, published: Path
) -> None:
    """With the published statistics, but random weights, because these weights are not available."""
    about = AUTOENCODERS[dataset]
    name, size = f"{about.name}_{about.num_features}", 2 ** (about.depth + 1)
    torch.manual_seed(0)
    encoder = FADEncoder(about.channels, about.num_features, about.depth)
    assert encoder.latent_layer.in_features == {"cifar10": 256, "celeba": 512}[dataset] * 4
    (tmp_path / "stat_checkpoints").mkdir()
    torch.save(encoder.state_dict() | {"decoder_input.bias": torch.zeros(2)}, tmp_path / f"stat_checkpoints/{name}.pth")
    statistics = f"stats/{about.name}_test_{about.num_features}.npz"
    (tmp_path / "stats").mkdir()
    shutil.copy(published / statistics, tmp_path / statistics)

    images = torch.randint(256, (300, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fad = FrechetAutoencoderDistance(dataset, tmp_path, num_groups=10)
    fad.update_reference(images, torch.arange(300))
    fad.update_generated(images, torch.arange(300))
    values = fad.compute()
    assert f"autoencoder {name}.pth" in values["fad_published"].note
    assert values["fad_eval"].value == pytest.approx(0, abs=1e-6)

    x = images.double() / 127.5 - 1  # the same distance, from its definition
    with torch.no_grad():
        latent = torch.cat([encoder.double().train()(part) for part in (x[:250], x[250:])])
    real = np.load(published / statistics)
    mean, covariance = torch.from_numpy(real["mu"]).double(), torch.from_numpy(real["sigma"])
    root = torch.linalg.eigvals(latent.T.cov() @ covariance).real.clamp(min=0).sqrt().sum()
    expected = (latent.mean(0) - mean).square().sum() + latent.T.cov().trace() + covariance.trace() - 2 * root
    assert values["fad_published"].value == pytest.approx(float(expected), rel=1e-4)


class Malicious:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("owned"),))


def test_faulty_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no autoencoder of 'kmnist', only of mnist, fmnist, cifar10, celeba"):
        FrechetAutoencoderDistance("kmnist", tmp_path, 10)
    with pytest.raises(
        FileNotFoundError, match=r"mnist_64\.pth does not exist; set --evaluation\.fad_dir to the folder"
    ):
        FrechetAutoencoderDistance("mnist", tmp_path, 10)
    with pytest.raises(ValueError, match="has statistics of 3 features, but the autoencoder has 64"):
        FrechetAutoencoderDistance("mnist", published_layout(tmp_path / "a", width=3), 10)
    folder = published_layout(tmp_path / "b")
    torch.save(FADEncoder(3, 128, 5).state_dict(), folder / "stat_checkpoints" / "cifar10_128.pth")
    with pytest.raises(
        ValueError, match="128 features and 5 convolutions; the autoencoder of cifar10 has 3, 128 and 4"
    ):
        FrechetAutoencoderDistance("cifar10", folder, 10)
    (folder / "stats" / "mnist_test_64.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not contain statistics of the FAD"):
        FrechetAutoencoderDistance("mnist", folder, 10)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "malicious.pth"
    for content in (Malicious(), {"weight": torch.zeros(2)}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is not an autoencoder of the FAD"):
            load_encoder(path)
    assert not Path("owned").exists()
