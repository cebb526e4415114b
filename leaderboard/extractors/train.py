"""Training of the suite's own feature extractor of a dataset, a small classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from datamodules import ImageDataModule
from datamodules.registry import find_data, make_data
from leaderboard.extractors.base import EXTRACTORS, METADATA_KEY, SmallNetwork, local_extractor, training_command
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
    """`"classes"` to predict labels, or `"rotation"` to predict by which quarter turn an image was rotated."""


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


OWN_RECIPE = Recipe(epochs=20, flip=True, task="rotation")
"""Recipe of all other datasets; it needs no labels."""

UNRELATED = frozenset(
    ("batch_size", "num_workers", "num_samples", "sample_batch_size", "sample_seed", "val_size", "flip")
)
"""Options of data modules that the images of the train split do not depend on."""


def train_extractor(
    data: str = "",
    config: str | None = None,
    root: str | None = None,
    epochs: int | None = None,
    task: Literal["classes", "rotation"] | None = None,
    output: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    trained_on: str | None = None,
    bfloat16: bool = False,
    data_options: dict[str, Any] = {},  # noqa: B006 (never changed)
) -> None:
    """Trains a classifier on a dataset's train split and saves it as the dataset's extractor for offline-v1.

    Faces have no classes, so the extractor of CelebA predicts by which quarter turn an image was rotated. The same is
    learned from all data that is not the suite's, unless the task is set.

    Args:
        data: Name of the dataset, such as digits, or the path of a class, such as mypackage.data.Shapes.
        config: Config of a training or a run whose data is used, instead of `data`.
        root: Folder of the dataset; read from the Hugging Face hub if not given.
        epochs: Passes over the train split; the dataset's recipe if not given.
        task: What is learned: classes, which needs labels, or quarter turns; the dataset's recipe if not given.
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
    recipe = RECIPES.get(module.name, OWN_RECIPE)
    recipe = recipe._replace(epochs=epochs or recipe.epochs, task=task or recipe.task)
    path = Path(output) if output is not None else EXTRACTORS / f"{module.name}.safetensors"
    if output is not None or module.name in RECIPES:
        _check_absent(path, overwrite)
    module.prepare_data()
    module.setup("fit")
    if output is None and module.name not in RECIPES:
        path = local_extractor(module)
        _check_absent(path, overwrite)
    images, labels = module.labelled("train")
    if recipe.task == "classes" and labels.min() < 0:
        raise ValueError(
            f"data={name!r} has images without a label, but the extractor is a classifier; add --task rotation"
        )
    sizes: dict[str, Any] = {
        "in_channels": images.shape[1],
        "num_classes": 4 if recipe.task == "rotation" else module.num_classes or int(labels.max()) + 1,
        "channels": list(recipe.channels),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # all random draws are on the CPU
        network = _fit(SmallNetwork(**sizes), images, labels, recipe, bfloat16)
    state = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    network.load_state_dict(state)  # test with the rounded weights of the file
    accuracy = _accuracy(network, *module.labelled("test"), recipe.task)
    options_used = f"--epochs {recipe.epochs} --seed {seed}{' --bfloat16 true' * bfloat16}"
    if module.name in RECIPES:
        command = training_command(module.name)
    else:
        relevant = {key: v for key, v in options.items() if v is not None and key not in UNRELATED | {"cache_dir"}}
        command = f"{training_command(name, relevant)} --task {recipe.task}"
    description = {
        "dataset": module.name,
        "dataset_fingerprint": module.fingerprint,
        "trained_on": trained_on or f"{module.title}: the {len(images):,} images of its train split",
        "task": recipe.task,
        "architecture": sizes,
        "test_accuracy": round(accuracy, 4),
        "command": f"{command} {options_used}",
    }
    # a single metadata entry, because safetensors writes several in random order and the file's hash must be stable
    write_atomic(path, save(state, {METADATA_KEY: json.dumps(description, sort_keys=True)}))
    learned = "test images classified" if recipe.task == "classes" else "quarter turns of test images recognised"
    print(f"{path}: {accuracy:.2%} of the {learned} correctly")


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


def _fit(network: SmallNetwork, images: Tensor, labels: Tensor, recipe: Recipe, bfloat16: bool) -> SmallNetwork:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = recipe.epochs * -(-len(images) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=steps)
    for _ in track(range(recipe.epochs), description="training"):
        for batch in torch.randperm(len(images)).split(_BATCH_SIZE):
            augmented = _shifted(images[batch]) if recipe.shift else images[batch]
            x, y = _examples(_mirrored(augmented) if recipe.flip else augmented, labels[batch], recipe.task)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                _, logits = network(x.to(device))
            loss = F.cross_entropy(logits.float(), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.cpu().eval()


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
