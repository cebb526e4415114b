"""Training of the suite's own feature extractors of a dataset: a small classifier and a denoising autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules import ImageDataModule
from datamodules.registry import find_data, make_data
from leaderboard.extractors.base import (
    DENOISING,
    METADATA_KEY,
    DenoisingEncoder,
    SmallNetwork,
    local_extractor,
    shipped_extractor,
    training_command,
)
from leaderboard.files import write_atomic

_BATCH_SIZE = 128
_LEARNING_RATE = 3e-3


class Recipe(NamedTuple):
    """How the extractor of a dataset is trained."""

    epochs: int
    channels: tuple[int, ...] = (32, 64, 128, 128)
    shift: bool = True
    """Whether images are shifted at random by up to an eighth of their size; off if all images are centred."""
    flip: bool = False
    """Whether images are mirrored at random; on if mirroring preserves the class."""
    task: str = "classes"
    """`"classes"` to predict labels, `"rotation"` to predict by which quarter turn an image was rotated, or
    `"denoising"` to restore noisy images."""
    features: int = 64
    """Width of the features of an autoencoder; a classifier's is its last number of channels."""


RECIPES = {
    "digits": Recipe(epochs=30, channels=(32, 64, 96, 64)),
    "mnist": Recipe(epochs=6),
    "fmnist": Recipe(epochs=15, shift=False, flip=True),
    "kmnist": Recipe(epochs=20),
    "letters": Recipe(epochs=20),
    "cifar10": Recipe(epochs=30, flip=True),
    "celeba": Recipe(epochs=10, flip=True, task="rotation"),
}
"""Recipe of each dataset. Rotation prediction: S. Gidaris et al., ICLR 2018, https://arxiv.org/abs/1803.07728."""


DENOISING_RECIPES = {
    "digits": Recipe(epochs=20, channels=(16, 32, 64), shift=False, task=DENOISING, features=32),
    "mnist": Recipe(epochs=1, channels=(16, 32, 64), shift=False, task=DENOISING),
    "fmnist": Recipe(epochs=1, channels=(16, 32, 64), shift=False, task=DENOISING),
    "kmnist": Recipe(epochs=6, channels=(16, 32, 64), shift=False, task=DENOISING),
    "letters": Recipe(epochs=15, channels=(16, 32, 64), shift=False, task=DENOISING),
    "cifar10": Recipe(epochs=1, channels=(16, 32, 64), shift=False, flip=True, task=DENOISING),
    "celeba": Recipe(epochs=4, channels=(16, 32, 64, 64), shift=False, flip=True, task=DENOISING),
}
"""Recipe of each autoencoder. Denoising: P. Vincent et al., ICML 2008, https://doi.org/10.1145/1390156.1390294."""

NOISE = 0.5
"""Largest standard deviation of the noise that autoencoders learn to remove, for pixels in [-1, 1]."""

OWN_RECIPES = {
    "classes": Recipe(epochs=20, flip=True),
    "rotation": Recipe(epochs=20, flip=True, task="rotation"),
    DENOISING: Recipe(epochs=20, channels=(16, 32, 64, 64), shift=False, task=DENOISING),
}
"""Recipes of all other datasets, by task; only classes need labels."""

UNRELATED = frozenset(
    ("batch_size", "num_workers", "num_samples", "sample_batch_size", "sample_seed", "val_size", "flip")
)
"""Options of data modules that the images of the train split do not depend on."""


def train_extractor(
    data: str = "",
    config: str | None = None,
    root: str | None = None,
    epochs: int | None = None,
    task: Literal["classes", "rotation", "denoising"] | None = None,
    output: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    trained_on: str | None = None,
    bfloat16: bool = False,
    data_options: dict[str, Any] = {},  # noqa: B006 (never changed)
) -> None:
    """Trains a feature extractor on a dataset's train split and saves it as the dataset's extractor.

    With `--task denoising` it is an autoencoder, whose features offline-v3 and standard-v3 compare. The others are
    classifiers, for offline-v1, and beside the autoencoder in offline-v3. Faces have no classes, so the classifier of
    CelebA predicts by which quarter turn an image was rotated. For data that is not the suite's, an autoencoder is
    trained unless the task is set.

    Args:
        data: Name of the dataset, such as digits, or the path of a class, such as mypackage.data.Shapes.
        config: Config of a training or a run whose data is used, instead of `data`.
        root: Folder of the dataset; read from the Hugging Face hub if not given.
        epochs: Passes over the train split; the dataset's recipe if not given.
        task: What is learned: classes, which needs labels, quarter turns, or to remove noise; the dataset's recipe if
            not given.
        output: File to write; if not given, the file of the shipped extractor, or for data that is not the suite's a
            file in the cache of decoded images, where `test` finds it.
        overwrite: Whether to replace an existing file. Results of different extractors cannot be compared.
        seed: Seed of the initial weights, the order of the images, their shifts and their mirroring.
        trained_on: Description of the images if they are not the dataset's own train split.
        bfloat16: Whether to train in mixed precision; evaluation always uses full precision.
        data_options: Further options of the data module, such as '{center_crop: null}'.

    Raises:
        ValueError: If the dataset is unknown, or images have no label to learn.
        FileExistsError: If the file exists.
    """
    name, options = find_data(data, config, data_options | ({} if root is None else {"root": root}))
    module = make_data(name, options)
    recipe = _recipe(module.name, task)
    recipe = recipe._replace(epochs=epochs or recipe.epochs)
    path = Path(output) if output is not None else shipped_extractor(module.name, recipe.task)
    if output is not None or module.name in RECIPES:
        _check_absent(path, overwrite)
    module.prepare_data()
    module.setup("fit")
    if output is None and module.name not in RECIPES:
        path = local_extractor(module, recipe.task)
        _check_absent(path, overwrite)
    images, labels = module.labelled("train")
    if recipe.task == "classes" and labels.min() < 0:
        raise ValueError(
            f"data={name!r} has images without a label, but the extractor is a classifier; add --task denoising"
        )
    network, quality = _train(module, images, labels, recipe, seed, bfloat16)
    options_used = f"--epochs {recipe.epochs} --seed {seed}{' --bfloat16 true' * bfloat16}"
    if module.name in RECIPES:
        command = training_command(module.name) + f" --task {recipe.task}" * (recipe.task == DENOISING)
    else:
        relevant = {key: v for key, v in options.items() if v is not None and key not in UNRELATED | {"cache_dir"}}
        command = f"{training_command(name, relevant)} --task {recipe.task}"
    description = {
        "dataset": module.name,
        "dataset_fingerprint": module.fingerprint,
        "trained_on": trained_on or f"{module.title}: the {len(images):,} images of its train split",
        "task": recipe.task,
        "architecture": network.architecture,
        QUALITIES[recipe.task][0]: round(quality, 4),
        "command": f"{command} {options_used}",
    }
    # a single metadata entry, because safetensors writes several in random order and the file's hash must be stable
    write_atomic(path, save(network.state, {METADATA_KEY: json.dumps(description, sort_keys=True)}))
    print(f"{path}: {quality:.2%} of the {QUALITIES[recipe.task][1]}")


QUALITIES = {
    "classes": ("test_accuracy", "test images classified correctly"),
    "rotation": ("test_accuracy", "quarter turns of test images recognised correctly"),
    DENOISING: ("explained_variance", "variance of test images explained"),
}
"""Name and description of the quality of each task."""


class Trained(NamedTuple):
    """Weights and architecture of a trained extractor."""

    state: dict[str, Tensor]
    architecture: dict[str, Any]


def _recipe(name: str, task: str | None) -> Recipe:
    """Returns the recipe of a dataset and task."""
    if name not in RECIPES:
        return OWN_RECIPES[task or DENOISING]
    if task == DENOISING:
        return DENOISING_RECIPES[name]
    return RECIPES[name]._replace(task=task or RECIPES[name].task)


def _train(
    module: ImageDataModule, images: Tensor, labels: Tensor, recipe: Recipe, seed: int, bfloat16: bool
) -> tuple[Trained, float]:
    """Trains an extractor; returns it in half precision, and its quality on test images."""
    sizes: dict[str, Any] = {"in_channels": images.shape[1], "channels": list(recipe.channels)}
    if recipe.task == DENOISING:
        sizes |= {"size": images.shape[-1], "num_features": recipe.features}
    else:
        sizes["num_classes"] = 4 if recipe.task == "rotation" else module.num_classes or int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # all random draws are on the CPU
        network: SmallNetwork | Autoencoder
        network = Autoencoder(**sizes) if recipe.task == DENOISING else SmallNetwork(**sizes)
        _fit(network, images, labels, recipe, bfloat16)
    kept = network.encoder if isinstance(network, Autoencoder) else network
    state = {key: value.half().contiguous() for key, value in kept.state_dict().items()}
    kept.load_state_dict(state)  # test with the rounded weights of the file
    test, test_labels = module.labelled("test")
    if isinstance(network, Autoencoder):
        return Trained(state, sizes), _explained_variance(network, test)
    return Trained(state, sizes), _accuracy(network, test, test_labels, recipe.task)


class Autoencoder(nn.Module):
    """Denoising autoencoder; only its encoder is saved.

    Args:
        in_channels: Channels `C` of the images.
        size: Side length of the images in pixels.
        channels: Output channels of each convolution.
        num_features: Width `D` of the features.
    """

    def __init__(self, in_channels: int, size: int, channels: Sequence[int], num_features: int) -> None:
        super().__init__()
        self.encoder = DenoisingEncoder(in_channels, size, channels, num_features)
        self.inlet = nn.Linear(num_features, self.encoder.head.in_features)
        widths = self.encoder.channels[::-1]
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, 2 * stride + (stride == 1), stride, padding=1)
            for c_in, c_out, stride in zip(widths, widths[1:], self.encoder.strides[::-1], strict=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns restored images `(B, C, H, W)` in [-1, 1] of images in [0, 255]."""
        x = self.inlet(self.encoder(images)[0])
        x = x.unflatten(1, (self.encoder.channels[-1], self.encoder.sizes[-1], self.encoder.sizes[-1]))
        for layer, size in zip(self.layers, self.encoder.sizes[-2::-1], strict=True):
            x = layer(F.silu(x))[:, :, :size, :size]
        return x


def _loss(network: nn.Module, images: Tensor, labels: Tensor, task: str) -> Callable[[torch.device], Tensor]:
    """Draws what is random of a batch on the CPU; returns a function that computes its loss on a device."""
    if task == DENOISING:
        clean = images.float()
        deviation = NOISE * 127.5 * torch.rand(len(images), 1, 1, 1)
        noisy = clean + deviation * torch.randn(images.shape)
        return lambda device: F.mse_loss(network(noisy.to(device)).float(), (clean / 127.5 - 1).to(device))
    x, y = _examples(images, labels, task)
    return lambda device: F.cross_entropy(network(x.to(device))[1].float(), y.to(device))


def data_command(module: ImageDataModule, options: Mapping[str, Any]) -> str:
    """Returns the command line that trains the extractor of a data module with these options."""
    kind = type(module)
    path = f"{kind.__module__}.{kind.__qualname__}"
    is_shipped = kind.__module__.partition(".")[0] == "datamodules"
    signatures = [signature(vars(base)["__init__"]) for base in reversed(kind.__mro__) if "__init__" in vars(base)]
    defaults = {option.name: option.default for found in signatures for option in found.parameters.values()}
    unrelated = UNRELATED | {key for key, value in options.items() if value is None or value == defaults.get(key)}
    relevant = {key: value for key, value in options.items() if key not in unrelated}
    return training_command(kind.__name__ if is_shipped else path, relevant)


def _check_absent(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists; set another --output, or --overwrite true (results of different extractors do not compare)"
        )


def _fit(network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, bfloat16: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = recipe.epochs * -(-len(images) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=steps)
    for _ in track(range(recipe.epochs), description="training"):
        for batch in torch.randperm(len(images)).split(_BATCH_SIZE):
            augmented = _shifted(images[batch]) if recipe.shift else images[batch]
            augmented = _mirrored(augmented) if recipe.flip else augmented
            loss_on = _loss(network, augmented, labels[batch], recipe.task)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = loss_on(device)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.cpu().eval()


def _shifted(images: Tensor) -> Tensor:
    """Shifts a batch at random by up to an eighth of its size, repeating the border."""
    height, width = images.shape[2:]
    reach = height // 8
    top, left = torch.randint(2 * reach + 1, (2,)).tolist()
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")
    return padded[:, :, top : top + height, left : left + width]


def _mirrored(images: Tensor) -> Tensor:
    """Mirrors each image of a batch with probability 1/2."""
    chosen = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def _examples(images: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets: images and labels, or the images in all quarter turns and the index of the turn."""
    if task == "classes":
        return images, labels
    turned = torch.cat([images.rot90(turn, (2, 3)) for turn in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(images))


@torch.no_grad()
def _accuracy(network: SmallNetwork, images: Tensor, labels: Tensor, task: str) -> float:
    correct = total = 0
    for batch in zip(images.split(_BATCH_SIZE), labels.split(_BATCH_SIZE), strict=True):
        x, y = _examples(*batch, task)
        correct += int((network(x)[1].argmax(1) == y).sum())
        total += len(y)
    return correct / total


@torch.no_grad()
def _explained_variance(network: Autoencoder, images: Tensor) -> float:
    """Returns `1 - mean squared error / variance` of restored images without noise."""
    pixels = images.double() / 127.5 - 1
    total = float((pixels - pixels.mean(0)).square().sum())
    error = sum(
        float((network(batch) - batch.float() / 127.5 + 1).double().square().sum())
        for batch in images.split(_BATCH_SIZE)
    )
    return 1 - error / total
