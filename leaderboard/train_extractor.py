"""Trains the suite's own feature extractor of a dataset: a small classifier of its labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

import datamodules
from datamodules import ImageDataModule
from leaderboard.features import EXTRACTORS, METADATA_KEY, SmallNetwork, training_command

_BATCH_SIZE = 128
_LEARNING_RATE = 3e-3


def train_extractor(
    data: str, root: str | None = None, epochs: int = 30, output: str | None = None, seed: int = 0
) -> None:
    """Trains a classifier on a dataset's train split and saves it as the dataset's extractor for offline-v1.

    Args:
        data: Name of the dataset, such as digits.
        root: Folder of the dataset; none reads the Hugging Face hub.
        epochs: Passes over the train split.
        output: File to write; none takes the place of the extractor that the suite ships.
        seed: Seed of the initial weights, the order of the images and their shifts.

    Raises:
        ValueError: If there is no such dataset, or its images have no labels.
    """
    options: dict[str, Any] = {} if root is None else {"root": root}
    module = _data_module(data)(**options)
    module.prepare_data()
    module.setup("fit")
    images, labels = module.labelled("train")
    if labels.min() < 0:
        raise ValueError(f"data={data!r} has images without a label, but the extractor is a classifier of them")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # all random numbers are drawn on the CPU
        network = _fit(images, labels, epochs)
    state = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    network.load_state_dict(state)  # the test sees the weights as rounded in the file
    accuracy = _accuracy(network, *module.labelled("test"))
    path = Path(output) if output is not None else EXTRACTORS / f"{module.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "dataset": module.name,
        "dataset_fingerprint": module.fingerprint,
        "architecture": {"in_channels": images.shape[1], "num_classes": network.head.out_features},
        "test_accuracy": round(accuracy, 4),
        "command": f"{training_command(module.name)} --epochs {epochs} --seed {seed}",
    }
    # one entry, since safetensors writes several in random order and the file's hash names the extractor
    path.write_bytes(save(state, {METADATA_KEY: json.dumps(description, sort_keys=True)}))
    print(f"{path}: {accuracy:.2%} of the test images classified correctly")


def _data_module(name: str) -> type[ImageDataModule]:
    """Finds a data module by its dataset's name, or its own."""
    kinds = [
        kind for kind in vars(datamodules).values() if isinstance(kind, type) and issubclass(kind, ImageDataModule)
    ]
    known = {kind.name: kind for kind in kinds if kind is not ImageDataModule}
    if name.lower() not in known:
        raise ValueError(f"data={name!r} is not a dataset of the suite; choose one of: {', '.join(sorted(known))}")
    return known[name.lower()]


def _fit(images: Tensor, labels: Tensor, epochs: int) -> SmallNetwork:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = SmallNetwork(images.shape[1], int(labels.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = epochs * -(-len(images) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=steps)
    for _ in track(range(epochs), description="training"):
        for batch in torch.randperm(len(images)).split(_BATCH_SIZE):
            _, logits = network(_shifted(images[batch]).to(device))
            loss = F.cross_entropy(logits, labels[batch].to(device))
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


@torch.no_grad()
def _accuracy(network: SmallNetwork, images: Tensor, labels: Tensor) -> float:
    correct = sum(
        int((network(x)[1].argmax(1) == y).sum())
        for x, y in zip(images.split(_BATCH_SIZE), labels.split(_BATCH_SIZE), strict=True)
    )
    return correct / len(labels)
