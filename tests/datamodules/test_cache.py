"""The cache is complete or absent, and is rebuilt when it is damaged or the source has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dataset_layouts import random_splits, write_idx

from datamodules import MNIST, DatasetError, ImageDataModule
from datamodules.cache import LOCK
from datamodules.sources import Record

SPLITS = random_splits()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], MNIST]:
    root = str(write_idx(tmp_path / "source", SPLITS))
    return lambda: MNIST(root, cache_dir=str(tmp_path / "cache"))


def entry(tmp_path: Path) -> Path:
    (path,) = (path for path in (tmp_path / "cache").iterdir() if path.name != LOCK)
    return path


def is_right(data: MNIST) -> bool:
    return torch.equal(data.labelled("train")[0][:, 0], torch.from_numpy(SPLITS["train"][0]))


def truncate(path: Path) -> None:
    file = path / "train_images.npy"
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    with (path / "test_images.npy").open("ab") as file:
        file.write(b"0")


def empty(path: Path) -> None:
    (path / "train_images.npy").write_bytes(b"")


def remove(path: Path) -> None:
    (path / "train_labels.npy").unlink()


def exchange(path: Path) -> None:
    (path / "test_labels.npy").replace(path / "train_labels.npy")


def forget(path: Path) -> None:
    (path / "meta.json").write_text("{")


def rewrite(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    meta["splits"]["train"]["images"]["shape"][0] = 39
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", [truncate, lengthen, empty, remove, exchange, forget, rewrite])
def test_a_damaged_entry_is_built_again(
    make: Callable[[], MNIST], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    fingerprint = make().fingerprint
    damage(entry(tmp_path))
    again = make()
    assert is_right(again)
    assert again.fingerprint == fingerprint
    assert entry(tmp_path)  # nothing else is left


def test_an_interrupted_build_leaves_nothing(
    make: Callable[[], MNIST], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: ImageDataModule, record: Record) -> None:
        raise KeyboardInterrupt

    data = make()
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataModule, "_decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert not list((tmp_path / "cache").iterdir())
    assert is_right(make())


def test_leftovers_of_a_killed_build_are_not_read(make: Callable[[], MNIST], tmp_path: Path) -> None:
    make().prepare_data()
    whole = entry(tmp_path)
    whole.rename(whole.with_name(f".{whole.name}-killed"))
    assert is_right(make())


def test_a_changed_source_is_read_again(make: Callable[[], MNIST], tmp_path: Path) -> None:
    first = make().fingerprint
    file = tmp_path / "source" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert make().fingerprint != first


def test_writing_to_images_changes_no_file(make: Callable[[], MNIST]) -> None:
    images, _ = make().labelled("train")
    images.zero_()
    assert is_right(make())


def test_when_another_process_is_faster_its_entry_is_kept(
    make: Callable[[], MNIST], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = ImageDataModule._decode
    kept: list[int] = []

    def decode_while_another_builds(self: ImageDataModule, record: Record) -> object:
        if not kept:
            kept.append(0)  # the other one decodes undisturbed
            make().prepare_data()
            kept[0] = entry_of(tmp_path).stat().st_ino
        return decode(self, record)

    monkeypatch.setattr(ImageDataModule, "_decode", decode_while_another_builds)
    assert is_right(make())
    assert entry(tmp_path).stat().st_ino == kept[0]


def entry_of(tmp_path: Path) -> Path:
    return next(path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_several_processes_at_once_all_succeed(make: Callable[[], MNIST], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started, fingerprints = context.Barrier(4), context.Queue()

    def build() -> None:
        started.wait()
        fingerprints.put(make().fingerprint)

    processes = [context.Process(target=build) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({fingerprints.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert entry(tmp_path)
    assert is_right(make())


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    root = str(write_idx(tmp_path / "source", SPLITS))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DatasetError, match=r"cannot be written to .*/file .*; give another folder with --data.cache_dir"
    ):
        MNIST(root, cache_dir=str(tmp_path / "file")).prepare_data()


def test_an_entry_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(write_idx(tmp_path / "source", SPLITS))

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(f"no right to move {self} to {target}")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(DatasetError, match=r"cannot be replaced .*; delete it, or give another --data.cache_dir"):
        MNIST(root, cache_dir=str(tmp_path / "cache")).prepare_data()


def test_the_cache_folder_can_be_set_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_DIFFUSION_CACHE", str(tmp_path))
    assert MNIST().cache_dir == tmp_path
    assert MNIST(cache_dir="~/here").cache_dir == Path.home() / "here"
    monkeypatch.delenv("SPIKING_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert MNIST().cache_dir == tmp_path / "xdg" / "spiking-diffusion-benchmark"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert MNIST().cache_dir == Path.home() / ".cache" / "spiking-diffusion-benchmark"


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_DIFFUSION_CACHE", str(tmp_path / "default"))
