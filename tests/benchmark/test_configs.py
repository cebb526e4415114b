from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from config_differences import differences
from PIL import Image

from benchmark.cli import main

CONFIGS = sorted(Path("configs").glob("*.yaml"))
REGRESSION = sorted(Path("configs/regress").glob("*.yaml"))  # trained in test_regress.py
PRESETS = sorted(Path("configs/presets").glob("*.yaml"))
ALIKE = [path for path in CONFIGS if path.stem.endswith(("_fmnist", "_kmnist", "_letters"))]
"""Configs of 28x28 data other than MNIST. Another test checks that only data and budget differ."""
SIZES = {"MNIST": 28, "FMNIST": 28, "KMNIST": 28, "Letters": 28, "CIFAR10": 32, "CelebA": 64}
TINY = [
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=1",
    "--data.batch_size=2",
    "--data.num_samples=2",
    "--monitor.every_n_epochs=0",
]
TINY_SPIKING_UNET = [*TINY, "--model.base_channels=4", "--model.num_res_blocks=1", "--model.num_steps=2"]
TINY_ANN = [*TINY, "--model.base_channels=32", "--model.num_res_blocks=1"]  # norms of 32 groups
TINY_TRANSFORMER = [*TINY, "--model.embed_dim=8", "--model.depth=3", "--model.num_steps=2", "--model.num_heads=2"]
TINY_SDIT = [*TINY, "--model.embed_dim=8", "--model.depth=2"]

TINY_TWO_STAGES = [
    *TINY,
    "--model.base_channels=4",
    "--model.num_steps=2",
    "--model.autoencoder_channels=4",
    "--model.autoencoder_epochs=1",
    "--trainer.max_steps=2",
    "--trainer.limit_train_batches=1",
]


FULL = [
    path for path in CONFIGS if path.stem not in ("quickstart", "sdit_digits", "spiking_rwkv_digits")
]  # examples for a CPU
SMALL = sorted(Path("configs/small").glob("*.yaml"))
OF_THE_DATASET = {
    "data.class_path": "the dataset itself",
    "data.center_crop": "CelebA is cropped to faces",
    "data.fit": "how 28 pixels become 32",
    "data.flip": "colour images are mirrored, characters and clothes are not",
    "data.image_size": "size of the generated images",
    "data.orientation": "Letters is stored transposed",
    "data.root": "Digits is embedded in scikit-learn",
    "data.val_size": "CelebA has a validation split of its own; Digits has 1,797 images",
    "model.in_channels": "grey or colour",
}
OF_THE_METHOD = {
    "fsddim": {
        "model.num_steps": "as published: T = 4 on CelebA, 8 elsewhere",
        "model.optimizer.lr": "as released: 0.001 for grey, 0.0005 for colour images",
        "trainer.max_steps": "1,500 epochs; 300,000 steps on CelebA",
    },
    "sdit": {
        "evaluation.protocol": "CIFAR-10 is resized to 28 x 28 pixels, which standard-v1 does not compare",
        "model.depth": "as released: larger for colour images",
        "model.embed_dim": "as released: larger for colour images",
        "model.image_size": "the position embedding has one entry per patch",
        "model.patch_size": "CelebA has 64 x 64 pixels and would have four times the tokens",
        "trainer.max_steps": "1,600 epochs",
    },
    "spiking_rwkv": {
        "model.image_size": "the position embedding has one entry per patch",
        "model.patch_size": "CelebA has 64 x 64 pixels and would have four times the tokens",
        "model.embed_dim": "larger for colour images",
        "model.depth": "larger for colour images",
    },
    "spiking_diffusion": {
        "model.num_train_timesteps": "one diffusion step per token, (image_size / 4)^2",
        "model.num_inference_steps": "as num_train_timesteps",
        "monitor.num_inference_steps": "as num_train_timesteps",
    },
}
OF_THE_SMALL_TRACK = {
    "trainer.max_steps": "as many as fit into the time of the track",
    "trainer.check_val_every_n_epoch": "an epoch of Digits is short",
    "model.lr_scheduler.T_max": "as trainer.max_steps",
    "model.base_channels": "1 M parameters at each depth",
    "model.channel_mult": "8 x 8 pixels are halved once, 28 x 28 twice",
}
OF_THE_METHOD_ON_THE_SMALL_TRACK = {
    "sdit": {
        "model.image_size": "the position embedding has one entry per patch",
        "model.patch_size": "4 x 4 tokens of 8 x 8 pixels, 7 x 7 of 28 x 28",
    },
    "spiking_rwkv": {
        "model.image_size": "the position embedding has one entry per patch",
        "model.patch_size": "4 x 4 tokens of 8 x 8 pixels, 7 x 7 of 28 x 28",
    },
    "spiking_diffusion": {
        "model.autoencoder_epochs": "as many as fit into the time of the track",
        "model.denoiser_epochs": "as many as fit into the time of the track",
        "model.num_codes": "8 x 8 pixels have 4 tokens and need fewer codes",
        "model.num_train_timesteps": "one diffusion step per token, (image_size / 4)^2",
        "model.num_inference_steps": "as num_train_timesteps",
        "trainer.limit_train_batches": "an epoch of 60,000 images takes longer than the track allows",
    },
}


def tiny(config: Path) -> list[str]:
    """Options that make a config small."""
    method = yaml.safe_load(config.read_text())["model"]["class_path"]
    special = {
        "DDPM": TINY_ANN,
        "SDiT": TINY_SDIT,
        "SpikingRWKV": TINY_TRANSFORMER,
        "SpikingDiffusion": TINY_TWO_STAGES,
    }
    return special.get(method, TINY_SPIKING_UNET)


def image_folder(root: Path, size: int, channels: int, classes: str = "01234567") -> Path:
    """Writes random images in the layout train/<class>/*.png, tall letters for the check of orientation."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k in range(8):
            pixels = rng.integers(0, 50, (size, size, channels), dtype=np.uint8)
            pixels[2:-2, size // 2 - 1 : size // 2 + 1] = 255
            path = root / split / classes[k] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)
    return root


def data_options(config: Path, tmp_path: Path) -> list[str]:
    data = yaml.safe_load(config.read_text())["data"]
    options = [f"--data.cache_dir={tmp_path / 'cache'}"]
    if data["class_path"] != "Digits":
        channels = 3 if data["class_path"] in ("CIFAR10", "CelebA") else 1
        classes = "ABCDEFGH" if data["class_path"] == "Letters" else "01234567"
        root = image_folder(tmp_path / "data", SIZES[data["class_path"]], channels, classes)
        options += [f"--data.root={root}", "--data.val_size=2"]
    if data["class_path"] == "CelebA":
        options.append("--data.center_crop=null")
    if data["class_path"] == "Letters":
        options.append("--data.orientation=upright")
    return options


@pytest.mark.parametrize("config", ALIKE, ids=lambda path: path.stem)
def test_config_is_accepted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", "--print_config"])
    assert not stop.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].endswith(yaml.safe_load(config.read_text())["model"]["class_path"])


@pytest.mark.slow
@pytest.mark.parametrize("config", [path for path in CONFIGS if path not in ALIKE], ids=lambda path: path.stem)
def test_config_trains_one_step(config: Path, tmp_path: Path) -> None:
    options = data_options(config, tmp_path) + tiny(config) + [f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    main(["fit", f"--config={config}", *options])
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{yaml.safe_load(config.read_text())['data']['class_path'].lower()}-")
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_changes_the_recipe_alone(preset: Path, tmp_path: Path) -> None:
    options = data_options(Path("configs/sddpm_cifar10.yaml"), tmp_path)
    options += TINY_SPIKING_UNET
    main(
        [
            "fit",
            "--config=configs/sddpm_cifar10.yaml",
            f"--config={preset}",
            *options,
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
        ]
    )
    (run,) = (tmp_path / "runs").iterdir()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    wanted = yaml.safe_load(preset.read_text())
    init = saved["model"]["init_args"]
    assert init["optimizer"]["init_args"]["lr"] == wanted["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert init["spike_grad"] == wanted["model"]["init_args"]["spike_grad"]
    assert init["channel_mult"] == [1, 2, 2, 4]


@pytest.mark.parametrize("config", [*CONFIGS, *REGRESSION], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_is_flat_and_headed(config: Path) -> None:
    text = config.read_text()
    assert text.startswith("# ")
    sections = [key for key in yaml.safe_load(text) if key in ("seed_everything", "trainer", "model", "data")]
    assert sections == ["seed_everything", "trainer", "model", "data"]


def method_of(config: Path) -> str:
    """What the file name says before the dataset: `fsddim_strict` of `fsddim_strict_mnist.yaml`."""
    return config.stem.rpartition("_")[0]


@pytest.mark.parametrize("method", sorted({method_of(path) for path in FULL}))
def test_configs_of_a_method_differ_only_where_listed(method: str) -> None:
    found = differences([path for path in FULL if method_of(path) == method])
    own = OF_THE_METHOD.get(method, {})
    unexpected = {key: values for key, values in found.items() if key not in OF_THE_DATASET | own}
    assert not unexpected
    assert own.keys() <= found.keys()  # else the list is out of date


@pytest.mark.parametrize("method", sorted({method_of(path) for path in SMALL}))
def test_small_configs_of_a_method_differ_only_where_listed(method: str) -> None:
    found = differences([path for path in SMALL if method_of(path) == method])
    own = OF_THE_METHOD_ON_THE_SMALL_TRACK.get(method, {})
    unexpected = {key: values for key, values in found.items() if key not in OF_THE_DATASET | OF_THE_SMALL_TRACK | own}
    assert not unexpected
    assert own.keys() <= found.keys()


def test_a_changed_value_and_a_missing_key_are_differences(tmp_path: Path) -> None:
    texts = {
        "a": "{model: {init_args: {lr: 1, beta: 0.5}}}",
        "b": "{model: {init_args: {lr: 2}}}",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert differences(sorted(tmp_path.glob("*.yaml"))) == {
        "model.beta": {"a": 0.5, "b": "(missing)"},
        "model.lr": {"a": 1, "b": 2},
    }


@pytest.mark.parametrize(
    "method", ["SDDPM", "SDM", "SDiT", "SpikingRWKV", "FSDDIM", "SpikingDiffusion", "DDPM", "ANNSNN"]
)
def test_defaults_make_a_configuration(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What no option names is in a run's config.yaml too, in words that are read again."""
    with pytest.raises(SystemExit):
        main(["fit", "--data=Digits", f"--model={method}", "--print_config"])
    printed = capsys.readouterr().out
    path = tmp_path / "config.yaml"
    path.write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", f"--config={path}", "--print_config"])
    assert capsys.readouterr().out == printed
    assert "serialize" not in printed


def test_an_optimiser_that_is_given_inherits_nothing_from_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Its class may be the same, which jsonargparse would take for a change of some options."""
    given = ["--model.autoencoder_optimizer=AdamW", "--model.autoencoder_optimizer.lr=0.5"]
    with pytest.raises(SystemExit):
        main(["fit", "--data=Digits", "--model=SpikingDiffusion", *given, "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["autoencoder_optimizer"]["init_args"]
    assert (options["lr"], options["weight_decay"], options["fused"]) == (0.5, 0.01, None)
