"""CelebA: 202,599 aligned photographs of faces, 178x218 in colour.

Liu, Luo, Wang and Tang, "Deep learning face attributes in the wild", ICCV 2015, arXiv 1411.7766.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.errors import DatasetError
from datamodules.files import list_files
from datamodules.images import center_crop, open_image, resize
from datamodules.sources import Reader, Record, Source, stat_identity

PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
"""The list as first published, or as Kaggle has it, with commas and a header."""
PARTITION_SPLITS = {"0": "train", "1": "valid", "2": "test"}


class CelebA(ImageDataModule):
    """CelebA: the official training partition, and the official validation partition if the source has it.

    Faces are cropped to the central 148 pixels and resized to 64, as FSDDIM and SDDPM do.

    Args:
        center_crop: Side length in pixels of the central square to crop; null does not crop, for sources that contain
            cropped faces.
        image_size: Side length in pixels after resizing; null resizes to 64.
        flip: Whether training images are mirrored at random.
    """

    name = "celeba"
    title = "CelebA"
    num_channels = 3
    native_size = 64
    num_classes = None
    sizes: ClassVar[Mapping[str, int]] = {"train": 162_770, "valid": 19_867, "test": 19_962}
    hub_id = "flwrlabs/celeba"
    hub_config = "img_align+identity+attr"
    hub_revision = "2d738f56e0e7f925ea36ae7c808ea925264aacec"
    original_layout = "img_align_celeba/ beside list_eval_partition.txt, as first published, or .csv, as on Kaggle"

    def __init__(
        self, *, center_crop: int | None = 148, image_size: int | None = None, flip: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(image_size=image_size, fit="resize", flip=flip, **kwargs)
        if center_crop is not None and center_crop < 1:
            raise ValueError(f"center_crop={center_crop} is too small; give 148, or null to keep the whole image")
        self.center_crop = center_crop

    def check_size(self, image: Image.Image, where: str) -> None:
        """Checks that there are enough pixels to crop."""
        if self.center_crop is not None and min(image.size) < self.center_crop:
            raise DatasetError(
                f"{where} has {image.width}x{image.height} pixels, too few to crop center_crop={self.center_crop}; "
                "if the source holds cropped faces, pass --data.center_crop null"
            )

    def fit_image(self, image: Image.Image) -> Image.Image:
        """Crops the face and resizes it."""
        if self.center_crop is not None:
            image = center_crop(image, self.center_crop)
        return resize(image, self.image_size)

    @property
    def geometry(self) -> dict[str, Any]:
        """Settings that the compared pixels depend on, in addition to the source."""
        return super().geometry | {"center_crop": self.center_crop}

    def find_original(self, root: Path) -> Source | None:
        """Finds the aligned images and their partition."""
        listed, _ = list_files(root)
        partition = next((file for file in listed if file.name in PARTITIONS), None)
        images = (file for file in listed if file.suffix == ".jpg" and file.parent.name == "img_align_celeba")
        first = next(images, None)
        if partition is None or first is None:
            return None
        files: dict[str, list[Path]] = {split: [] for split in PARTITION_SPLITS.values()}
        for number, line in enumerate(partition.read_text().splitlines(), start=1):
            match line.replace(",", " ").split():
                case ["image_id", "partition"]:
                    continue
                case [name, part] if part in PARTITION_SPLITS:
                    files[PARTITION_SPLITS[part]].append(first.with_name(name))
                case _:
                    raise DatasetError(f"{partition}, line {number}, is {line!r}; expected a file name and 0, 1 or 2")
        everything = [partition, *(file for paths in files.values() for file in paths)]
        if absent := [file for file in everything if not file.is_file()]:
            raise DatasetError(f"{partition} lists {len(absent)} images that are not there, first {absent[0]}")
        readers: dict[str, Reader] = {split: partial(_read, paths) for split, paths in files.items() if paths}
        return Source(f"aligned images in {first.parent}", stat_identity(everything), lambda: readers, len(everything))


def _read(files: list[Path]) -> Iterator[Record]:
    for file in files:
        yield Record(open_image(file.read_bytes(), str(file)), -1, str(file))
