from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmark.cli import main

CONFIGS = sorted(Path("configs").glob("*.yaml"))
REGRESSION = sorted(Path("configs/regress").glob("*.yaml"))  # trained in test_regress.py
PRESETS = sorted(Path("configs/presets").glob("*.yaml"))
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

TINY_TWO_STAGES = [
    *TINY,
    "--model.base_channels=4",
    "--model.num_steps=2",
    "--model.autoencoder_channels=4",
    "--model.autoencoder_epochs=1",
    "--trainer.max_steps=2",
    "--trainer.limit_train_batches=1",
]


def tiny(config: Path) -> list[str]:
    """Options that make a config small."""
    method = yaml.safe_load(config.read_text())["model"]["class_path"]
    special = {"DDPM": TINY_ANN, "SDiT": TINY_TRANSFORMER, "SpikingDiffusion": TINY_TWO_STAGES}
    return special.get(method, TINY_SPIKING_UNET)


def image_folder(root: Path, size: int, channels: int) -> Path:
    """Writes random images in the layout train/<class>/*.png, tall letters for the check of orientation."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k in range(8):
            pixels = rng.integers(0, 50, (size, size, channels), dtype=np.uint8)
            pixels[2:-2, size // 2 - 1 : size // 2 + 1] = 255
            path = root / split / "ABCDEFGH"[k] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)
    return root


def data_options(config: Path, tmp_path: Path) -> list[str]:
    data = yaml.safe_load(config.read_text())["data"]
    options = [f"--data.cache_dir={tmp_path / 'cache'}"]
    if data["class_path"] != "Digits":
        channels = 3 if data["class_path"] in ("CIFAR10", "CelebA") else 1
        root = image_folder(tmp_path / "data", SIZES[data["class_path"]], channels)
        options += [f"--data.root={root}", "--data.val_size=2"]
    if data["class_path"] == "CelebA":
        options.append("--data.center_crop=null")
    if data["class_path"] == "Letters":
        options.append("--data.orientation=upright")
    return options


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_one_step(config: Path, tmp_path: Path) -> None:
    options = data_options(config, tmp_path) + tiny(config) + [f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    main(["fit", f"--config={config}", *options])
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{yaml.safe_load(config.read_text())['data']['class_path'].lower()}-")
    assert (run / "checkpoints" / "last.ckpt").is_file()


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


@pytest.mark.parametrize("method", ["SDDPM", "SDM", "SDiT", "FSDDIM", "SpikingDiffusion", "DDPM", "ANNSNN"])
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
