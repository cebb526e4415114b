from __future__ import annotations

import json
import shlex
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from safetensors.torch import save_file

from benchmark.cli import main
from datamodules import Digits, ImageFolder
from leaderboard.evaluation.reference import build_parts
from leaderboard.extractors import train as training
from leaderboard.extractors.base import (
    EXTRACTORS,
    InceptionExtractor,
    SmallExtractor,
    SmallNetwork,
    load_extractor,
    local_extractor,
)
from leaderboard.extractors.train import RECIPES, Recipe, train_extractor
from leaderboard.protocols import OFFLINE_V1, OFFLINE_V2, Protocol
from leaderboard.record.records import find_records, read_record

pytestmark = pytest.mark.slow


def images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weights_file(path: Path, in_channels: int = 1, **described: object) -> Path:
    network = SmallNetwork(in_channels, 10)
    metadata = {"dataset": "toy", "architecture": {"in_channels": in_channels, "num_classes": 10}} | described
    save_file(network.state_dict(), path, {"extractor": json.dumps(metadata)})
    return path


@pytest.fixture(scope="module")
def inception(random_weights: dict[str, Path]) -> InceptionExtractor:
    """Inception with random weights, read from a file as the published ones are."""
    with pytest.warns(UserWarning, match="is not the published Inception file"):
        return InceptionExtractor(str(random_weights["inception"]))


def test_inception_shapes_and_grey_images(inception: InceptionExtractor) -> None:
    grey = images(2, 1, 28, 28)
    features, logits = inception(grey)
    assert features.shape == (2, inception.num_features)
    assert logits.shape == (2, inception.num_classes)
    assert features.std() > 0
    torch.testing.assert_close(inception(grey.repeat(1, 3, 1, 1))[0], features)
    assert inception.name == "inception-v3-compat"
    assert len(inception.sha256) == 64


def test_inception_refuses_other_channels(inception: InceptionExtractor) -> None:
    with pytest.raises(ValueError, match=r"1 or 3 channels, found shape \(2, 4, 8, 8\)"):
        inception(images(2, 4, 8, 8))


def test_errors_without_network_or_file_name_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = (
        r"cannot download .*no network.* https://github\.com/toshas/.*\.pth .*--evaluation\.inception_weights PATH"
    )
    with pytest.raises(RuntimeError, match=message + ".* offline-v3"):
        load_extractor("inception-v3-compat", "cifar10")
    with pytest.raises(FileNotFoundError, match=r"inception_weights=nowhere\.pth is not a file; set it to the path"):
        load_extractor("inception-v3-compat", "cifar10", inception_weights="nowhere.pth")


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 1, 28, 28), (3, 3, 32, 32), (2, 3, 64, 64), (1, 3, 9, 13)])
def test_small_extractor_takes_any_size(tmp_path: Path, shape: tuple[int, ...]) -> None:
    extractor = SmallExtractor(weights_file(tmp_path / "x.safetensors", in_channels=shape[1]))
    features, logits = extractor(images(*shape))
    assert features.shape == (shape[0], 64)
    assert logits.shape == (shape[0], 10)
    assert not features.requires_grad
    assert extractor.name == "toy"


def test_metadata_determine_the_width_of_the_network(tmp_path: Path) -> None:
    sizes = {"in_channels": 1, "num_classes": 3, "channels": [8, 16, 8, 24]}
    metadata = {"dataset": "toy", "architecture": sizes}
    save_file(SmallNetwork(**sizes).state_dict(), tmp_path / "x", {"extractor": json.dumps(metadata)})
    extractor = SmallExtractor(tmp_path / "x")
    features, logits = extractor(images(2, 1, 8, 8))
    assert features.shape == (2, 24) == (2, extractor.num_features)
    assert logits.shape == (2, 3) == (2, extractor.num_classes)


def test_extractor_of_other_data_returns_a_warning(tmp_path: Path, inception: InceptionExtractor) -> None:
    path = weights_file(tmp_path / "x.safetensors", dataset_fingerprint="a" * 64, trained_on="half of it")
    extractor = SmallExtractor(path)
    assert extractor.trained_on_other_data("a" * 64) == ""
    expected = "extractor trained on other data than the reference: half of it (fingerprint aaaaaaaaaaaa)"
    assert extractor.trained_on_other_data("b" * 64) == expected
    assert "other data of toy (fingerprint unknown)" in SmallExtractor(weights_file(path)).trained_on_other_data(
        "b" * 64
    )
    assert inception.trained_on_other_data("b" * 64) == ""


@pytest.mark.usefixtures("digits")
def test_evaluation_with_an_extractor_of_other_data_warns(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "x.safetensors", dataset_fingerprint="a" * 64, trained_on="half of it")
    runs = f"--trainer.default_root_dir={tmp_path}"
    small = ["--trainer.max_steps=1", "--model.base_channels=4", "--model.num_inference_steps=1"]
    main(["fit", "--config=configs/quickstart.yaml", runs, *small, "--trainer.enable_progress_bar=false"])
    with pytest.warns(UserWarning, match="trained on other data than the reference: half of it"):
        main(["test", runs, f"--evaluation.extractor={path}", "--data.sample_batch_size=500"])
    (record,) = (read_record(path) for path in find_records([tmp_path]))
    for key in ("fd_toy", "kd_toy"):
        assert record.metrics[key].note.startswith("extractor trained on other data than the reference: half of it")


def test_autocast_does_not_change_the_features(tmp_path: Path) -> None:
    extractor = SmallExtractor(weights_file(tmp_path / "x.safetensors"))
    x = images(4, 1, 8, 8)
    expected, _ = extractor(x)
    allowed = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = extractor(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_wrong_images_are_refused(tmp_path: Path) -> None:
    extractor = SmallExtractor(weights_file(tmp_path / "x.safetensors"))
    with pytest.raises(
        ValueError, match=r"torch.float32 images of shape \(1, 1, 8, 8\); it expects uint8 \(B, C, H, W\)"
    ):
        extractor(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"it expects 1 channel\(s\) of at least 8x8"):
        extractor(images(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 8x8"):
        extractor(images(1, 1, 7, 8))


def test_errors_about_weights_name_the_training_command(tmp_path: Path) -> None:
    command = "create it with: python -m benchmark train-extractor"
    with pytest.raises(FileNotFoundError, match=rf"no extractor for 'sky' \(it has: .*digits.*\); {command} sky"):
        load_extractor("suite", "sky")
    with pytest.raises(FileNotFoundError, match=rf"gone\.safetensors is not a file; {command} gone"):
        load_extractor(str(tmp_path / "gone.safetensors"), "digits")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(1)}, foreign)
    for content in (foreign.read_bytes(), b"text"):
        foreign.write_bytes(content)
        with pytest.raises(ValueError, match=r"foreign\.safetensors is not an extractor of the suite"):
            SmallExtractor(foreign)


SHIPPED = sorted(path for path in EXTRACTORS.glob("*.safetensors") if not path.stem.endswith("_ae"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_extractors_are_small_and_name_their_command(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    metadata = SmallExtractor(path).metadata
    assert metadata["dataset"] == path.stem
    assert metadata["command"].startswith(f"python -m benchmark train-extractor {path.stem}")
    assert metadata["test_accuracy"] > {"fmnist": 0.92, "mnist": 0.99}.get(path.stem, 0.9)


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "mnist"), ("fmnist", "fmnist"), ("kmnist", "kmnist"), ("letters", "letters_az")]
)
def test_shipped_extractors_have_the_accuracy_they_claim(name: str, folder: str, shared_data: Path) -> None:
    extractor = load_extractor("suite", name)
    assert isinstance(extractor, SmallExtractor)
    (file,) = (shared_data / folder).glob("test*.parquet")
    rows = load_dataset("parquet", data_files=str(file), split="train[:1000]").with_format("torch")
    x, labels = torch.stack([row["image"] for row in rows]), torch.stack([row["label"] for row in rows])
    accuracy = float((extractor(x)[1].argmax(1) == labels).double().mean())
    claimed = extractor.metadata["test_accuracy"]
    assert accuracy == pytest.approx(claimed, abs=4 * (claimed * (1 - claimed) / len(x)) ** 0.5)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Digits:
    monkeypatch.setenv("SPIKING_DIFFUSION_CACHE", str(tmp_path))
    return Digits()


def test_shipped_digits_extractor_has_the_accuracy_it_claims(digits: Digits) -> None:
    extractor = load_extractor("suite", "digits")
    assert isinstance(extractor, SmallExtractor)
    x, labels = digits.labelled("test")
    accuracy = float((extractor(x)[1].argmax(1) == labels).double().mean())
    assert accuracy > 0.95
    assert accuracy == pytest.approx(extractor.metadata["test_accuracy"], abs=0.004)  # one image may round differently
    assert extractor.metadata["dataset_fingerprint"] == digits.fingerprint


@pytest.mark.usefixtures("digits")
def test_training_is_reproducible_and_leaves_the_random_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    state = torch.get_rng_state()
    for file in files:
        train_extractor("Digits", epochs=1, output=str(file))
    assert torch.equal(torch.get_rng_state(), state)
    assert files[0].read_bytes() == files[1].read_bytes()
    for output in (str(files[0]), None):
        with pytest.raises(FileExistsError, match=r"exists; set another --output, or --overwrite true"):
            train_extractor("Digits", epochs=1, output=output)
    extractor = SmallExtractor(files[0])
    assert extractor.metadata["command"] == "python -m benchmark train-extractor digits --epochs 1 --seed 0"
    assert "of the test images classified correctly" in capsys.readouterr().out


@pytest.mark.parametrize("size", [32, 64])
def test_colour_extractors_are_trained_by_the_same_command(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = {32: "cifar10", 64: "celeba"}[size]
    for split in ("train", "test"):
        for k in range(10):
            path = tmp_path / "data" / split / f"class{k}" / "image.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(images(size, size, 3).roll(k).numpy()).save(path)
    options = {"cache_dir": str(tmp_path / "cache")} | ({"center_crop": None} if name == "celeba" else {})
    file = tmp_path / f"{name}.safetensors"
    options_of_files = [f"--root={tmp_path / 'data'}", f"--output={file}", f"--data_options={json.dumps(options)}"]
    main(
        [
            "train-extractor",
            name,
            *options_of_files,
            "--epochs=1",
            "--bfloat16=true",
            "--trained_on=ten images of noise",
        ]
    )
    extractor = SmallExtractor(file)
    assert extractor.num_classes == (4 if name == "celeba" else 10)
    assert extractor.metadata["task"] == ("rotation" if name == "celeba" else "classes")
    assert extractor.metadata["trained_on"] == "ten images of noise"
    assert extractor.metadata["command"].endswith(f"{name} --epochs 1 --seed 0 --bfloat16 true")
    assert extractor(images(2, 3, size, size))[0].shape == (2, 128)
    shown = "quarter turns of test images recognised" if name == "celeba" else "test images classified"
    assert shown in capsys.readouterr().out


@pytest.mark.usefixtures("digits")
def test_quarter_turns_can_be_learned_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=4, channels=(16, 16, 32, 32), flip=True, task="rotation")
    monkeypatch.setitem(RECIPES, "digits", recipe)
    labelled = Digits.labelled

    def unlabelled(self: Digits, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, labels = labelled(self, split)
        return x, torch.full_like(labels, -1)

    monkeypatch.setattr(Digits, "labelled", unlabelled)
    train_extractor("digits", output=str(tmp_path / "x.safetensors"))
    assert SmallExtractor(tmp_path / "x.safetensors").metadata["test_accuracy"] > 0.5  # by chance 0.25


def test_mirroring_mirrors_about_half_of_the_images() -> None:
    torch.manual_seed(0)
    x = images(64, 1, 2, 4)
    mirrored = training._mirrored(x)
    turned = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, x, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(mirrored, x, strict=True)])
    assert torch.equal(turned, ~kept)
    assert 16 < turned.sum() < 48


def write_own(folder: Path) -> str:
    for k in range(40):
        path = folder / ("light", "dark")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(8, 8).roll(k).numpy() // (1 + k % 2)).save(path)
    return str(folder)


OWN_CLASS = """
from datamodules import ImageFolder

class Shades(ImageFolder):
    def __init__(self, **kwargs):
        super().__init__(image_size=8, channels=1, **kwargs)
"""


@pytest.mark.parametrize("task", ["rotation", "denoising"])
@pytest.mark.parametrize("way", ["class", "config", "path"])
def test_extractors_of_own_data_need_no_labels_and_are_found_again(
    way: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKING_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "shades.py").write_text(OWN_CLASS)
    root = write_own(tmp_path / "own")
    options = {"image_size": 8, "channels": 1}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"class_path": "ImageFolder", "init_args": options | {"root": root}}}))
    arguments = {
        "class": ["ImageFolder", f"--root={root}", f"--data_options={json.dumps(options)}"],
        "config": [f"--config={config}"],
        "path": ["shades.Shades", f"--root={root}"],
    }[way]
    chosen = [] if task == "denoising" else [f"--task={task}"]
    main(["train-extractor", *arguments, *chosen, "--epochs=1"])
    data = ImageFolder(root, **options)
    extractor = SmallExtractor(local_extractor(data, task))
    protocol, expected = (OFFLINE_V2, ("own_ae", 0)) if task == "denoising" else (OFFLINE_V1, ("own", 4))
    assert (extractor.name, extractor.num_classes) == expected
    assert extractor.metadata["task"] == task
    assert extractor.metadata["dataset_fingerprint"] == data.fingerprint
    (part,) = build_parts(protocol, data, (None, None, None), None)
    assert part.extractor.sha256 == extractor.sha256
    with pytest.raises(FileExistsError, match=r"extractor-own-8px-.* exists"):
        main(["train-extractor", *arguments, *chosen])
    main(["reference", *arguments, f"--protocol={protocol.name}"])
    assert list((tmp_path / "cache").glob(f"reference-own-{protocol.name}-*.safetensors"))


def test_the_classes_of_own_data_can_be_learned(tmp_path: Path) -> None:
    options = {"image_size": 8, "channels": 1, "cache_dir": str(tmp_path / "cache")}
    file = str(tmp_path / "x.safetensors")
    train_extractor(
        "ImageFolder", root=write_own(tmp_path / "own"), epochs=1, task="classes", output=file, data_options=options
    )
    extractor = SmallExtractor(file)
    assert (extractor.num_classes, extractor.metadata["task"]) == (2, "classes")
    assert " --task classes --epochs 1" in extractor.metadata["command"]


@pytest.mark.parametrize(("protocol", "task"), [(OFFLINE_V1, "rotation"), (OFFLINE_V2, "denoising")])
def test_the_advice_trains_the_missing_extractor(
    protocol: Protocol, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKING_DIFFUSION_CACHE", str(tmp_path / "cache"))
    root = write_own(tmp_path / "my own images")
    options = {"root": root, "image_size": 8, "channels": 1, "name": None, "test_fraction": 0.1, "batch_size": 3}
    with pytest.raises(
        FileNotFoundError, match="no extractor for 'my-own-images'; train it once, then repeat"
    ) as error:
        build_parts(protocol, ImageFolder(**options), (None, None, None), None, options=options)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[:5] == ["python", "-m", "benchmark", "train-extractor", "ImageFolder"]
    assert command[5:] == ["--root", root, "--data_options", '{"image_size": 8, "channels": 1}', "--task", task]
    main([*command[3:], "--epochs=1"])
    assert build_parts(protocol, ImageFolder(**options), (None, None, None), None, options=options)


def test_every_dataset_has_a_recipe() -> None:
    assert set(RECIPES) == {"digits", "mnist", "fmnist", "kmnist", "letters", "cifar10", "celeba"}


def test_training_refuses_unknown_data_and_missing_labels(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data='sky' is not a dataset of the suite; choose one of: celeba, .*mnist"):
        train_extractor("sky")
    with pytest.raises(ValueError, match=r"data='digits' does not accept the options foo: .*'foo'"):
        train_extractor("digits", data_options={"foo": 1})
    with pytest.raises(ValueError, match=r"data='digits' does not accept the options root"):
        train_extractor("digits", root="/tmp")
    monkeypatch.setattr(Digits, "labelled", lambda self, split: (images(4, 1, 8, 8), torch.full((4,), -1)))
    with pytest.raises(ValueError, match="data='digits' has images without a label"):
        train_extractor("digits", overwrite=True)
