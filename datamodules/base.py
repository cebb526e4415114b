"""Base class of all datamodules: geometry, value range, reference images and the seeds of generated images."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from PIL import Image
from platformdirs import user_cache_path
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.cache import Entry, Sample, build_entry, open_entry
from datamodules.errors import DatasetError, DatasetNotFoundError
from datamodules.files import ARCHIVES, counted, list_files, named
from datamodules.images import decode, resize
from datamodules.loading import (
    FilledBatches,
    Seeds,
    TrainingImages,
    TrainingOrder,
    WholeBatches,
    to_bytes,
    whole_batches,
    world_size,
)
from datamodules.sources import Reader, Record, Source, find_image_folder
from datamodules.tables import LABEL_COLUMNS, Columns, find_parquet, find_saved, hub

CACHE_VERSION = 2
CACHE_VARIABLE = "SPIKING_DIFFUSION_CACHE"
CACHE_NAME = "spiking-diffusion-benchmark"
"""Folder of decoded images in the user's cache folder."""
REFERENCE_BATCH = 100
"""Reference images per batch: fixed, so that their statistics do not depend on the batch size of sampling."""
Split = Literal["train", "test", "valid"]
HOLD_OUT_SEED = 0
"""Seed of the permutation that selects validation images: the same images in every run."""


class ImageDataModule(L.LightningDataModule):
    """Images for training, reference images for comparison, and the seeds of the images to generate.

    Training and validation batches are float32 `(B, C, H, W)` in [-1, 1]; with `with_labels` they are pairs of these
    images and their classes, int64 `(B,)` from 0 to `num_classes - 1`. Test and prediction batches are int64 seeds
    `(B,)`, one per image to generate. `reference_batches` yields uint8 images in the geometry of the comparison: the
    dataset's own size with `fit="pad"`, `image_size` with `fit="resize"`.

    Args:
        root: Folder of the dataset; null reads it from the Hugging Face hub.
        batch_size: Training and validation images per batch and device.
        image_size: Side length in pixels of the images the model sees; null keeps the dataset's own.
        fit: How images are brought to that size: zero padding, removed before the comparison, or bilinear resizing.
        flip: Whether training images are mirrored at random.
        val_size: Number of training images held out for validation; 0 uses the source's validation split, if any.
        num_workers: Number of loader processes for training and validation.
        cache_dir: Folder of decoded images; null uses $SPIKING_DIFFUSION_CACHE, then spiking-diffusion-benchmark in
            the user's cache folder ($XDG_CACHE_HOME or ~/.cache on Linux).
        num_samples: Number of images to generate; null uses the number of the evaluation protocol, 64 in `predict`.
        sample_batch_size: Images per batch and device when generating.
        sample_seed: Seed of the first generated image; image k has the seed `sample_seed + k`.
        revision: Revision of the dataset on the hub; null uses the one pinned here, or else the latest.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    name: str
    """Name in files and records, of lower-case letters, digits, "_" and "-"."""
    title: str
    """Name in messages."""
    num_channels: int
    """1 for grey, 3 for colour."""
    native_size: int
    """Side length in pixels at which images are compared with `fit="pad"`."""
    num_classes: int | None = None
    """Number of classes; None if unknown."""
    class_names: Sequence[str] = ()
    """Classes in the order of their labels, as folders may be named; numbers are always understood."""
    sizes: ClassVar[Mapping[str, int]] = {}
    """Published number of images of each split; a source with other numbers is named in records."""
    hub_id: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    original_layout: str = ""
    """Files that `find_original` finds, in words."""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        image_size: int | None = None,
        fit: Literal["pad", "resize"] = "pad",
        flip: bool = False,
        val_size: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        num_samples: int | None = None,
        sample_batch_size: int = 250,
        sample_seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.image_size = self.native_size if image_size is None else image_size
        self.fit = fit
        self.flip = flip
        self.val_size = val_size
        self.num_workers = num_workers
        folder = cache_dir or os.environ.get(CACHE_VARIABLE) or user_cache_path(CACHE_NAME, appauthor=False)
        self.cache_dir = Path(folder).expanduser()
        self.num_samples = num_samples
        self.sample_batch_size = sample_batch_size
        self.sample_seed = sample_seed
        self.revision = revision or self.hub_revision
        self.with_labels = False  # set by a method that is trained on classes
        for argument in ("batch_size", "image_size", "sample_batch_size"):
            _require_at_least(1, argument, getattr(self, argument))
        if num_samples is not None:
            _require_at_least(1, "num_samples", num_samples)
        for argument in ("val_size", "num_workers", "sample_seed"):
            _require_at_least(0, argument, getattr(self, argument))
        if fit not in ("pad", "resize"):
            raise ValueError(f"fit={fit!r} is unknown; choose 'pad' or 'resize'")
        if root is not None and revision is not None:
            raise ValueError(
                f"revision={revision!r} belongs to the hub, but root={root!r} is a folder; give one of the two"
            )
        self._compared_size = self.native_size if fit == "pad" else self.image_size
        self._padding, odd = divmod(self.image_size - self._compared_size, 2)
        if self._padding < 0 or odd:
            raise ValueError(
                f"image_size={image_size} cannot be reached by padding {self.title}'s {self.native_size} pixels "
                f"equally on both sides; give {self.native_size} plus an even number, or --data.fit resize"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of the images the model sees."""
        return self.num_channels, self.image_size, self.image_size

    @property
    def compared_size(self) -> int:
        """Side length in pixels at which generated and reference images are compared."""
        return self._compared_size

    @property
    def geometry(self) -> dict[str, Any]:
        """Settings that the compared pixels depend on, in addition to the source."""
        return {"size": self._compared_size}

    @property
    def model_geometry(self) -> dict[str, Any]:
        """Settings that the pixels a model sees depend on, in addition to the source."""
        return {"image_size": self.image_size} | self.geometry

    @property
    def source(self) -> str:
        """Description of the source that was read; it says so if the numbers of images are not the published ones."""
        sizes = {split: self._entry.size(split) for split in self.sizes if split in self._entry.splits}
        others = [
            f"{count:,} of {self.sizes[split]:,} {split}"
            for split, count in sizes.items()
            if count != self.sizes[split]
        ]
        kind = (
            "a subset"
            if all(count <= self.sizes[split] for split, count in sizes.items())
            else "not the published data"
        )
        return str(self._entry.meta["source"]) + (f" ({kind}: {', '.join(others)} images)" if others else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the decoded splits before crop and resize; equal for all file formats with the same pixels."""
        return str(self._entry.meta["fingerprint"])

    @property
    def training_data(self) -> dict[str, Any]:
        """What a model trained on this data has seen, as plain values for checkpoints and records.

        Name and fingerprint of the dataset, number of training images, and geometry of the images the model sees.
        """
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "geometry": self.model_geometry,
            "images": len(self._subsets[0]),
        }

    @property
    def summary(self) -> str:
        """What was read, in one line: source, files, images, classes, and what was left out."""
        entry, source = self._entry, self._source
        labels = torch.cat([entry.labels(split) for split in entry.splits])
        unknown = int((labels < 0).sum())
        classes = len(labels[labels >= 0].unique())
        parts = [
            counted(source.files, "file") if source.files else "",
            ", ".join(
                f"{entry.size(split):,} {split} images" for split in ("train", "valid", "test") if split in entry.splits
            ),
            counted(classes, "class", "classes"),
            f"{counted(unknown, 'image')} without a label" if 0 < unknown < len(labels) else "",
            f"left out: {', '.join(source.left_out)}" if source.left_out else "",
        ]
        if unknown == len(labels):
            parts[2] = f"no labels (no class folders, no column {', '.join(LABEL_COLUMNS)})"
        return f"{self.title} from {self.source}: {'; '.join(filter(None, parts))}"

    def num_reference(self, split: Split = "train") -> int:
        """Number of images of a split.

        Raises:
            DatasetError: If the source has no such split.
        """
        if split not in self._entry.splits:
            raise DatasetError(
                f"{self.title} from {self.source} has no {split} split (it has: {', '.join(self._entry.splits)}), but "
                "the evaluation compares with it; give a source that has one, or choose another --evaluation.protocol"
            )
        return self._entry.size(split)

    def prepare_data(self) -> None:
        """Decodes the dataset into the cache unless it is there, and says what was read; prediction reads no images.

        Lightning calls this once per machine.
        """
        if self.trainer is not None and self.trainer.predicting:
            return
        print(f"data: {self.summary}", file=sys.stderr)

    def setup(self, stage: str | None = None) -> None:
        """Opens the training and validation images; testing and prediction need none."""
        if stage in (None, "fit", "validate"):
            self._subsets  # noqa: B018

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Returns a loader of shuffled full batches; a training resumed within an epoch gets the rest of that epoch.

        Raises:
            ValueError: If there are too few images for one batch.
        """
        images = self._labelled(0)
        if (share := len(images) // world_size()) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} exceeds the {share} training images of each device; "
                f"give --data.batch_size {share} or less"
            )
        epoch = done = 0
        if self.trainer is not None:
            epoch = self.trainer.current_epoch
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
            done = 0 if progress.is_last_batch else progress.current.processed
        order = TrainingOrder(images, done * self.batch_size, epoch, self.flip)
        return self._loader(images, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        """Returns a loader of the validation images in order, or an empty list if there are none."""
        images = self._labelled(1)
        return self._loader(images, sampler=FilledBatches(images, self.batch_size)) if len(images) else []

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Returns a loader of the seeds to sample, each on one device, in the same batches for any number of devices.

        Raises:
            ValueError: If `num_samples` was not given.
        """
        if self.num_samples is None:
            raise ValueError("num_samples is not given; say how many images to generate: --data.num_samples 64")
        seeds = Seeds(self.sample_seed, self.num_samples)
        shard = WholeBatches(self.num_samples, self.sample_batch_size) if world_size() > 1 else None
        return whole_batches(seeds, self.sample_batch_size, sampler=shard)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Returns a loader of the seeds to sample, as for testing."""
        return self.test_dataloader()

    def reference_batches(self, split: Split = "train") -> Iterator[Tensor]:
        """Yields a whole split in order, with held-out images, as uint8 `(B, C, H, W)` in the compared geometry."""
        yield from self._entry.images(split).split(REFERENCE_BATCH)

    def labelled(self, split: Literal["train", "test"] = "train") -> tuple[Tensor, Tensor]:
        """Returns images `(N, C, H, W)` uint8 in the compared geometry and labels `(N,)` from 0, -1 if unknown."""
        return self._entry.images(split), self._entry.labels(split)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Converts generated images in [-1, 1] to uint8 in the compared geometry: clamped, rounded, without padding.

        Raises:
            ValueError: If the shape differs from the training images, or a pixel is not finite.
        """
        return to_bytes(self.compared(images))

    def compared(self, images: Tensor) -> Tensor:
        """Removes the padding of generated images `(B, C, H, W)`; values are not clamped.

        Raises:
            ValueError: If the shape differs from the training images, or a pixel is not finite.
        """
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"generated images have the shape {tuple(images.shape)}, expected (B, {expected})")
        if not images.isfinite().all():
            raise ValueError(
                "generated images contain NaN or infinite values, which are not pixels: the model or its sampler has "
                "diverged; lower the learning rate, raise the precision or choose another solver"
            )
        pad, end = self._padding, self._padding + self._compared_size
        return images[..., pad:end, pad:end]

    def find_source(self) -> Source:
        """Finds the images; override it for images from elsewhere than a folder or the hub.

        Raises:
            DatasetError: If a folder holds several datasets, or one in several formats.
            DatasetNotFoundError: If there is nothing that can be read.
        """
        layouts = (
            "train*.parquet and test*.parquet (Hugging Face layout), a folder of datasets' save_to_disk, train/ and "
            "test/ folders of images" + (f", or {self.original_layout}" if self.original_layout else "")
        )
        columns = Columns(class_names=self.class_names)
        if self.root is None:
            if self.hub_id is None:
                raise DatasetNotFoundError(f"{self.title} needs a folder: give --data.root FOLDER that holds {layouts}")
            return hub(self.title, self.hub_id, self.hub_config, self.revision, layouts, columns)
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise self._not_found("is not a folder", layouts)
        found = [
            find_parquet(root, columns),
            find_saved(root, columns),
            find_image_folder(root, self.class_names),
            self.find_original(root),
        ]
        sources = [source for source in found if source is not None]
        if len(sources) > 1:
            raise DatasetError(
                f"--data.root {root} holds {self.title} in several formats: "
                f"{', '.join(source.description for source in sources)}; keep one, or give its folder"
            )
        if not sources:
            archives = [file.name for file in list_files(root)[0] if file.name.lower().endswith(ARCHIVES)]
            hint = f" (unpack {named(archives)} first)" if archives else ""
            raise self._not_found(f"holds none of its layouts{hint}", layouts)
        return sources[0]

    def _not_found(self, problem: str, layouts: str) -> DatasetNotFoundError:
        elsewhere = f", or leave root out to read {self.hub_id} from the Hugging Face hub" if self.hub_id else ""
        return DatasetNotFoundError(
            f"{self.title} was not found: --data.root {self.root} {problem}. Looked for {layouts}. "
            f"Give the folder that holds them{elsewhere}."
        )

    def find_original(self, root: Path) -> Source | None:
        """Finds the dataset in its original file format below a folder; None if it is not there."""
        return None

    def canonical(self, train: Reader) -> Callable[[Record], Record]:
        """Returns a function that undoes the source's conventions (orientation, first label) for one record."""
        return lambda record: record

    def check_size(self, image: Image.Image, where: str) -> None:
        """Checks the size of an image before it is decoded, since a small file may contain a huge image.

        Raises:
            DatasetError: If it is not the dataset's.
        """
        if image.size != (self.native_size, self.native_size):
            raise DatasetError(
                f"{where} has {image.width}x{image.height} pixels, expected {self.native_size}x{self.native_size}; "
                f"is this {self.title}?"
            )

    def fit_image(self, image: Image.Image) -> Image.Image:
        """Crops and resizes an image to the compared geometry."""
        return resize(image, self._compared_size)

    @cached_property
    def _source(self) -> Source:
        return self.find_source()

    @cached_property
    def _entry(self) -> Entry:
        source = self._source
        key = json.dumps([CACHE_VERSION, self.name, source.identity, self.geometry], sort_keys=True)
        path = self.cache_dir / f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return open_entry(path) or self._build(path, source)

    @cached_property
    def _subsets(self) -> tuple[TrainingImages, TrainingImages]:
        """The training images and the validation images."""
        entry = self._entry
        train = entry.images("train")
        if self.val_size >= len(train):
            raise ValueError(f"val_size={self.val_size} leaves none of the {len(train)} training images; give less")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(HOLD_OUT_SEED))
        held_out, kept = (part.sort().values for part in order.split([self.val_size, len(train) - self.val_size]))
        valid = train
        if self.val_size == 0 and "valid" in entry.splits:
            valid, held_out = entry.images("valid"), torch.arange(entry.size("valid"))
        return (
            TrainingImages(train, kept, self._padding),
            TrainingImages(valid, held_out, self._padding),
        )

    def _labelled(self, part: int) -> TrainingImages:
        """Returns the training (0) or validation images (1), with their classes if `with_labels` is set.

        Raises:
            DatasetError: If the class of an image is not known.
        """
        images = self._subsets[part]
        if not self.with_labels:
            return images
        own = part == 1 and self.val_size == 0 and "valid" in self._entry.splits
        split: Split = "valid" if own else "train"
        labels = self._entry.labels(split)
        if unknown := int((labels < 0).sum()):
            raise DatasetError(
                f"{unknown:,} of the {len(labels):,} {split} images of {self.title} from {self.source} have no label, "
                "but the method is trained on classes; give a source with labels, or train without them: "
                "--model.num_classes 0"
            )
        return TrainingImages(torch.from_numpy(images.images), torch.from_numpy(images.indices), self._padding, labels)

    def _loader(self, images: TrainingImages, **options: Any) -> DataLoader[Tensor]:
        return whole_batches(
            images,
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _build(self, path: Path, source: Source) -> Entry:
        splits = source.open()
        canonical = self.canonical(splits["train"])

        def samples(reader: Reader) -> Iterator[Sample]:
            for record in reader():
                yield self._decode(canonical(record))

        decoded = {split: samples(splits[split]) for split in sorted(splits)}
        return build_entry(path, source.description, decoded, self.fit_image)

    def _decode(self, record: Record) -> Sample:
        """Decodes and checks one image."""
        self.check_size(record.image, record.where)
        image = decode(record.image, "L" if self.num_channels == 1 else "RGB", record.where)
        if record.label < -1 or (self.num_classes is not None and record.label >= self.num_classes):
            raise DatasetError(
                f"{record.where} has the label {record.label}, expected 0 to {(self.num_classes or 0) - 1}; "
                f"is this {self.title}?"
            )
        return image, record.label


def _require_at_least(least: int, argument: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{argument}={value} is too small; give --data.{argument} {least} or more")
