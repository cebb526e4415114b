"""Images made by other code are measured as the images of a test are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from benchmark.cli import main
from datamodules import Digits
from leaderboard.add import add, find_problems
from leaderboard.energy import ARITHMETIC
from leaderboard.evaluation.images import count_copies, fingerprint, measure, read_cost, read_images
from leaderboard.evaluation.reference import build_parts, prepare_reference
from leaderboard.protocols import OFFLINE_V1, PROTOCOLS
from leaderboard.record.entries import Entry
from leaderboard.record.records import Record, RecordError, find_records, read_record, write_record
from leaderboard.reports.boards import measured_boards
from leaderboard.reports.table import markdown

Make = Callable[..., Record]
COST = {"parameters": 1000, "nfe": 4, "macs": 2e9, "sops": 1e9, "num_steps": 8, "solver": "theirs"}


@pytest.fixture(scope="module")
def real() -> Tensor:
    """The test images of the digits, uint8 `(297, 1, 8, 8)`."""
    return Digits().labelled("test")[0].clone()


def write(images: Tensor, path: Path, key: str = "arr_0") -> Path:
    """Writes images as other code does, and returns the path; torchvision writes grey images in colour."""
    rows = images.permute(0, 2, 3, 1).numpy()
    if path.suffix == ".npz":
        np.savez(path, **{key: rows, "labels": np.arange(len(rows))})
    elif path.suffix == ".npy":
        np.save(path, rows)
    else:
        for k, image in enumerate(images):
            file = path / f"class {k % 3}" / f"{k}.png" if path.name == "nested" else path / f"sample-{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_image(image.float() / 255, file)
    return path


@pytest.mark.parametrize("name", ["folder", "images.npz", "images.npy"])
def test_the_same_images_are_read_from_every_format(name: str, real: Tensor, tmp_path: Path) -> None:
    images, source = read_images(write(real[:120], tmp_path / name), 1)
    assert torch.equal(images, real[:120])  # in order: 10 after 9
    assert source.startswith({"folder": "120 .png files in ", "images.npz": ".npz file "}.get(name, ".npy file "))
    assert fingerprint(images) == fingerprint(real[:120])


def test_nested_folders_hidden_entries_and_other_files(
    real: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(real[:7], tmp_path / "nested")
    (folder / "labels.csv").write_text("a")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0.png").write_bytes(b"")
    images, _ = read_images(folder, 1)
    assert torch.equal(images, real[[0, 3, 6, 1, 4, 2, 5]])
    assert "hidden entr" in (printed := capsys.readouterr().out)
    assert ".csv" in printed


def test_grey_and_colour_are_converted_only_without_loss(real: Tensor, tmp_path: Path) -> None:
    colour = real[:5].expand(-1, 3, -1, -1).contiguous()
    assert torch.equal(read_images(write(colour, tmp_path / "grey.npy"), 1)[0], real[:5])
    assert torch.equal(read_images(write(real[:5], tmp_path / "grey.npz"), 3)[0], colour)
    np.save(tmp_path / "flat.npy", real[:5, 0].numpy())
    assert torch.equal(read_images(tmp_path / "flat.npy", 1)[0], real[:5])
    colour[3, 0, 2, 2] += 1
    with pytest.raises(ValueError, match="image 3 has colours, but the dataset is grey"):
        read_images(write(colour, tmp_path / "red.npy"), 1)
    with pytest.raises(ValueError, match="expected grey"):
        read_images(write(colour, tmp_path / "red"), 1)


ARRAYS: dict[str, tuple[Any, str]] = {
    "floats": (np.zeros((4, 8, 8, 1), np.float32), r"has the type float32, expected bytes \(uint8\)"),
    "channels first": (np.zeros((4, 1, 8, 8), np.uint8), r"becomes it by array\.transpose\(0, 2, 3, 1\)"),
    "one image": (np.zeros((8, 8), np.uint8), r"has the shape \(8, 8\), expected \(N, H, W, C\)"),
    "no image": (np.zeros((0, 8, 8, 1), np.uint8), r"has the shape \(0, 8, 8, 1\)"),
    "cast": (np.ones((4, 8, 8), np.uint8), r"has only the values 0 and 1, .* \(x \* 255\)"),
    "objects": (np.array([None, {}], dtype=object), "cannot be read as an array"),
}


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_other_arrays_are_refused(case: str, suffix: str, tmp_path: Path) -> None:
    array, message = ARRAYS[case]
    path = tmp_path / f"x{suffix}"
    (np.savez if suffix == ".npz" else np.save)(path, array)
    with pytest.raises(ValueError, match=message):
        read_images(path, 1)


def test_black_images_can_be_measured(tmp_path: Path) -> None:
    """A model that collapsed makes them."""
    np.save(tmp_path / "black.npy", np.zeros((4, 8, 8), np.uint8))
    assert read_images(tmp_path / "black.npy", 1)[0].shape == (4, 1, 8, 8)


def test_other_files_are_refused(real: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist; give a folder of images, or a file \*\.npz"):
        read_images(tmp_path / "nothing", 1)
    with pytest.raises(ValueError, match=r"has the arrays samples, labels, expected arr_0"):
        read_images(write(real[:3], tmp_path / "x.npz", key="samples"), 1)
    for name, content in (("damaged.npz", b"PK\3\4"), ("damaged.npy", b""), ("images.zip", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as an array|is neither a folder nor a file"):
            read_images(tmp_path / name, 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no images \(1 other file \(\.txt\)\)"):
        read_images(tmp_path / "empty", 1)
    folder = write(real[:3], tmp_path / "mixed")
    Image.new("L", (9, 8)).save(folder / "sample-1.png")
    with pytest.raises(ValueError, match=r"sample-1\.png has 9x8 pixels, but .*sample-0\.png has 8x8"):
        read_images(folder, 1)


def test_lossy_files_are_said(real: Tensor, tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    Image.fromarray(real[0, 0].numpy()).save(folder / "a.jpg")
    with pytest.warns(UserWarning, match=r"\.jpg files are compressed with loss"):
        assert read_images(folder, 1)[1] == f"1 .jpg files in {folder}"


def test_copies_are_counted(real: Tensor) -> None:
    distinct = len(real.flatten(1).unique(dim=0))
    assert count_copies(torch.cat([real, real[:20]])) == len(real) + 20 - distinct


def test_metrics_equal_those_of_a_test(real: Tensor) -> None:
    """The same numbers as by the parts that `test` updates, whatever the batches."""
    data = Digits()
    (part,) = build_parts(OFFLINE_V1, data, (None, None, None), None)
    prepare_reference([part], data, OFFLINE_V1, torch.device("cpu"))
    for indices in torch.arange(len(real)).split(70):
        part.update_generated(real[indices], indices)
    found = measure(real, data, OFFLINE_V1, draft=True)
    assert found.extractor.name == "digits"
    assert found.metrics.keys() == part.compute().keys() == {f"{k}_digits" for k in ("fd", "kd", "precision", "recall")}
    for key, value in part.compute().items():
        assert (found.metrics[key].value, found.metrics[key].uncertainty) == pytest.approx(
            (value.value, value.uncertainty), rel=1e-5
        )
        assert found.metrics[key].num_samples == len(real)


def test_deviations_need_draft(real: Tensor) -> None:
    with pytest.raises(ValueError, match=r"it takes 2,000 generated images, not 297.* or add --draft"):
        measure(real, Digits(), OFFLINE_V1)
    with pytest.raises(ValueError, match="which takes 2000 to 10000"):
        measure(real[:1].expand(10_001, -1, -1, -1), Digits(), OFFLINE_V1, draft=True)
    for wrong in (real.float(), real[..., 1:], real.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match=r"compares digits as bytes \(torch\.uint8\) of shape \(N, 1, 8, 8\)"):
            measure(wrong, Digits(), OFFLINE_V1, draft=True)
    with pytest.raises(ValueError, match="images that are not rounded to bytes"):
        measure(real, Digits(), PROTOCOLS["paper-sddpm"])


@pytest.fixture(scope="module")
def evaluated(real: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record of 2,000 images and a stated cost."""
    given, folder = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("evaluated")
    (given / "cost.json").write_text(json.dumps(COST))
    images = write(torch.cat([real] * 7)[:2000], given / "images.npz")
    options = ["--data=digits", "--protocol=offline-v1", f"--output={folder}", "--url=https://example.org/code"]
    main(["evaluate", f"--images={images}", *options, "--name=theirs, v2", f"--cost={given / 'cost.json'}"])
    return folder


@pytest.mark.slow
def test_records_of_images_are_apart(
    evaluated: Path, make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = find_records([evaluated])
    stated = read_record(path)
    assert (stated.method, stated.draft, stated.checkpoint, stated.seeds) == ("theirs, v2", False, None, {})
    assert stated.images is not None
    assert (stated.images.count, stated.images.url) == (2000, "https://example.org/code")
    assert stated.images.copies >= 2000 - 297
    assert stated.images.source == ".npz file .../images.npz"
    assert stated.counted_cost.energy_strict_mj == pytest.approx(2 * 4.6 + 0.9)
    assert (stated.nfe, stated.num_steps, stated.solver) == (4, 8, "theirs")
    assert Entry(path, stated).status == "images"
    assert Entry(path, stated).samples.is_file()
    assert Entry(path, stated).in_run
    plain, other = replace(stated, method="plain", cost=None, nfe=None, num_steps=None, solver=""), tmp_path / "x.json"
    assert find_problems(stated) == find_problems(plain) == []
    with pytest.raises(ValueError, match="the record of plain is of images only and states no cost"):
        assert plain.counted_cost

    worse = make_record(fd=99.0, dataset=plain.dataset, extractor=plain.extractor)
    text = markdown([(path, stated), (other, plain), (tmp_path / "worse.json", worse)])
    ranks = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][2:]
    assert ranks == ["| 1", "| images", "| images"]
    assert "made by other code, so that \\`leaderboard verify\\` cannot repeat them" in text
    (board,) = measured_boards([(path, stated), (other, plain), (tmp_path / "worse.json", worse)])
    assert [row.source for row in board.rows] == ["measured", "images", "images"]
    marks = sorted(board.plots[ARITHMETIC][0].marks, key=lambda m: m.point.quality)
    assert [mark.point.ranked for mark in marks] == [False, True]
    assert "sha256" in board.rows[1].details[0].facts["Images"]

    other = write_record(plain, evaluated / "plain" / "records")
    main(["leaderboard", f"--records=[{evaluated}]"])
    printed = capsys.readouterr().out
    assert len(re.findall("^ *(?:> )?images", printed, re.MULTILINE)) == 2
    assert "tensorboard" not in printed
    main(["leaderboard", "seeds", f"--records=[{evaluated}]"])  # has no row of them
    assert "theirs" not in capsys.readouterr().out
    main(["leaderboard", "render", f"--records=[{evaluated}]", f"--output={tmp_path / 'page'}"])
    assert ">images</span> 2</dt>" in (tmp_path / "page" / "index.html").read_text()
    main(["leaderboard", "compare", str(path), str(other)])
    add(str(path), str(tmp_path / "added"))
    assert len(list((tmp_path / "added").glob("*.json"))) == 1
    other.unlink()


@pytest.mark.slow
def test_verify_says_that_images_cannot_be_repeated(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["leaderboard", "verify", str(find_records([evaluated])[0])])
    assert stop.value.code == 2
    assert (
        "measured images that other code made: measure them again with `evaluate --images`" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": None, "images": None}, "cost: null, which only a record with `images` may have"),
        ({"checkpoint": {"name": "a", "sha256": "b"}}, "checkpoint: a record with `images` was measured without"),
    ],
)
def test_inconsistent_records_are_refused(
    change: dict[str, Any], message: str, evaluated: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(find_records([evaluated])[0].read_text()) | change))
    with pytest.raises(RecordError, match=message):
        read_record(path)


@pytest.mark.parametrize("url", ["javascript:alert(1)", "https://a b", "https://<b>"])
def test_addresses_are_checked(url: str, real: Tensor, tmp_path: Path) -> None:
    path = write(real, tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"--url: expected an http\(s\) address"):
        main(["evaluate", f"--images={path}", "--data=digits", "--protocol=offline-v1", "--draft", f"--url={url}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": -1}, "macs: expected 0 or more"),
        ({"nfe": 0}, "nfe: expected 1 or more"),
        ({"firing_rate": 2}, "firing_rate: expected a share"),
        ({"macs": 0, "sops": 0}, "macs, sops: both are 0"),
        ({"acs": 1.0}, "acs: 1, fewer than"),
        ({"energy": 1}, "energy: unknown field"),
        ({"parameters": "many"}, "parameters: expected int"),
    ],
)
def test_costs_are_checked(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(COST | change))
    with pytest.raises(ValueError, match=f"cost.json: field {message}"):
        read_cost(tmp_path / "cost.json")


def test_images_are_required() -> None:
    with pytest.raises(ValueError, match="--images is missing"):
        main(["evaluate", "--data=digits"])
    with pytest.raises(ValueError, match="give either the name of a dataset"):
        main(["evaluate", "--images=x"])


def test_data_root_is_accepted_as_in_other_commands(tmp_path: Path, real: Tensor) -> None:
    options = [f"--images={write(real, tmp_path / 'x.npy')}", "--data=mnist", "--data.root", str(tmp_path / "nowhere")]
    with pytest.raises(ValueError, match=r"compares mnist as bytes"):
        main(["evaluate", *options, "--protocol=offline-v1", "--draft"])


@pytest.mark.slow
def test_round_trip(make_record: Make, evaluated: Path, tmp_path: Path) -> None:
    record = read_record(find_records([evaluated])[0])
    assert read_record(write_record(record, tmp_path)) == record
    assert "images" not in json.loads(write_record(make_record(), tmp_path).read_text())
