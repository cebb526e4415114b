from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leaderboard.files import write_atomic
from leaderboard.pictures import grid, save_png
from leaderboard.protocols import STANDARD_V1
from leaderboard.record.entries import Entry
from leaderboard.record.records import MetricValue, Record, write_record
from leaderboard.reports.boards import Row, measured_boards, picture, published_boards
from leaderboard.reports.published import Published, read_published

Make = Callable[..., Record]


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published()


def test_incomparable_records_have_separate_boards(make_record: Make) -> None:
    records = [make_record(), make_record(fd=1.0, variant="best"), make_record(protocol=STANDARD_V1)]
    boards = measured_boards((Path(f"{i}.json"), r) for i, r in enumerate(records))
    assert [[row.name for row in board.rows] for board in boards] == [["SDDPM, best", "SDDPM"], ["SDDPM"]]
    assert [board.title for board in boards] == ["digits, offline-v1", "digits, standard-v1"]


def test_drafts_come_last_and_are_not_ranked(make_record: Make) -> None:
    records = [make_record(fd=0.1, draft=True), make_record(fd=9.0)]
    (board,) = measured_boards((Path(f"{i}.json"), r) for i, r in enumerate(records))
    assert [(row.source, row.cells["#"].value) for row in board.rows] == [("measured", 1), ("draft", None)]
    wide, narrow = board.plots["arithmetic-45nm"]
    assert [m.on_front for m in wide.marks] == [m.on_front for m in narrow.marks] == [True, False]


def test_row_contains_the_record_file(make_record: Make, tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    ((row,),) = (board.rows for board in measured_boards([(path, make_record())]))
    (detail,) = row.details
    assert detail.json == path.read_text()
    assert detail.file == path.name
    assert row.anchor == detail.anchor
    facts = " ".join(detail.facts.values())
    for part in ("a" * 64, "b" * 64, "f" * 64, "torch 2.8", "0" * 40, "sampling 0", "63,470,000"):
        assert part in facts
    assert detail.config == "model:\n  num_steps: 4\n"


def test_seeds_share_a_row_and_keep_their_records(make_record: Make, tmp_path: Path) -> None:
    records = [make_record(fd=1.0 + seed, seeds={"training": seed}) for seed in (2, 0, 1)]
    paths = [write_record(record, tmp_path / "records") for record in records]
    entry = Entry(paths[1], records[1])
    write_atomic(entry.repetition, paths[1].read_text())
    write_atomic(entry.verification("Third party"), paths[1].read_text())
    (board,) = measured_boards(zip(paths, records, strict=True))
    (row,) = board.rows
    assert (str(row.cells["fd_digits"]), row.cells["Seeds"].text) == ("2.0 ±2.5", "3")
    assert (row.cells["Repeated"].text, row.cells["Verified"].text) == ("1 of 3", "1 of 3")
    assert [detail.name for detail in row.details] == ["seed 0", "seed 1", "seed 2"]
    assert [str(detail.cells["fd_digits"]) for detail in row.details] == [f"{n}.000 (±0.024)" for n in (1, 2, 3)]
    assert [detail.file for detail in row.details] == [paths[i].name for i in (1, 2, 0)]
    assert "Repeated" in row.details[0].facts
    assert "Verified by Third party" in row.details[0].facts
    assert "Repeated" not in row.details[1].facts


def test_columns_have_a_direction_and_notes_become_footnotes(make_record: Make) -> None:
    metrics = {
        "fid": MetricValue(19.7, 0.2, 50_000, "singular covariance"),
        "is_mean": MetricValue(8.1, 0.1, 50_000, "another note"),
    }
    (board,) = measured_boards([(Path("a.json"), make_record(metrics=metrics))])
    columns = {column.name: column for column in board.columns}
    assert (columns["FID"].better, columns["IS"].better, columns["Solver"].better) == ("lower", "higher", "")
    assert (columns["FID"].numeric, columns["Variant"].numeric) == (True, False)
    assert board.footnotes == ["another note", "singular covariance"]
    assert board.mark(board.rows[0].cells["FID"]) == 2
    assert "FID: singular covariance" in board.rows[0].details[0].facts["Notes"]


def test_a_method_that_is_not_the_published_one_has_a_footnote(make_record: Make) -> None:
    records = [make_record(method="spiking-rwkv", fd=1.0), make_record(method="sddpm", fd=2.0)]
    (board,) = measured_boards((Path(f"{i}.json"), r) for i, r in enumerate(records))
    assert [board.marks(row) for row in board.rows] == [[1], []]
    assert "not SDiT as released" in board.footnotes[0]
    labels = {column.name: column.label for column in board.columns}
    assert (labels["mJ"], labels["NFE"]) == ("45 nm arithmetic, mJ", "NFE")
    assert all(column.meaning for column in board.columns if column.name in ("mJ", "Seeds", "Repeated", "Verified"))


def test_published_boards_separate_protocols_and_keep_every_result(published: Published) -> None:
    boards = published_boards(published)
    assert len({(board.title) for board in boards}) == len(boards)
    rows = [row for board in boards for row in board.rows]
    assert len(rows) == len(published.results)
    assert len({row.anchor for row in rows}) == len(rows)
    assert all(row.source == "published" for row in rows)
    assert all("#" not in row.cells for row in rows)
    uncertain = [
        c for row in rows for name, c in row.cells.items() if name in ("FID", "IS", "fad_published") if c.value
    ]
    assert {cell.uncertainty for cell in uncertain} == {"?"}


def test_published_numbers_are_shown_as_printed_with_their_caveats(published: Published) -> None:
    (board,) = (board for board in published_boards(published) if board.title == "cifar10, paper-sddpm")
    row = next(row for row in board.rows if row.cells["FID"].value == 19.73)
    shown = {name: cell.text for name, cell in row.cells.items()}
    assert (shown["FID"], shown["M params"], shown["T"], shown["Steps"]) == ("19.73", "63.61", "4", "1,000")
    assert row.link == ("Source", "https://arxiv.org/abs/2408.16467")
    marked = [board.footnotes[n - 1] for n in board.marks(row)]
    assert any("46.21" in note for note in marked)
    assert json.loads(row.details[0].json)["caveats"] == row.caveats
    assert [len(plot.marks) for plot in board.plots["published"]] == [3, 3]
    assert shown["Reproduced"] == "not tried"


def test_method_key_ignores_spelling(make_record: Make, published: Published) -> None:
    (board,) = measured_boards([(Path("a.json"), make_record(method="spiking_diffusion"))])
    keys = {row.method: row.method_key for b in published_boards(published) for row in b.rows}
    assert board.rows[0].method_key == keys["Spiking-Diffusion"]
    (board,) = measured_boards([(Path("a.json"), make_record(method="<->"))])
    assert board.rows[0].method_key == "<->"


def decoded(uri: str) -> Image.Image:
    head, content = uri.split(",", 1)
    assert head.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_picture_is_the_grid_and_a_strip_of_four(tmp_path: Path) -> None:
    images = torch.arange(16, dtype=torch.uint8).mul(16).view(16, 1, 1, 1).expand(16, 1, 4, 4)
    page = grid(images, columns=8, scale=2)
    save_png(page, tmp_path / "grid.png")
    found = picture(tmp_path / "grid.png")
    assert found is not None
    assert np.array_equal(np.asarray(decoded(found.whole).convert("L")), page[0].numpy())
    strip = np.asarray(decoded(found.thumbnail).convert("L"))
    assert set(np.unique(strip)) == {0, 16, 32, 48, 255}


def test_large_picture_is_compressed(tmp_path: Path) -> None:
    noise = torch.randint(256, (3, 400, 400), generator=torch.Generator().manual_seed(0)).byte()
    save_png(noise, tmp_path / "grid.png")
    found = picture(tmp_path / "grid.png")
    assert found is not None
    assert decoded(found.whole).size == (400, 400)
    assert len(found.whole) < (tmp_path / "grid.png").stat().st_size


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"<svg onload='alert(1)'/>"])
def test_unreadable_picture_is_omitted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "grid.png").write_bytes(content)
    assert picture(tmp_path / "grid.png") is None
    assert picture(tmp_path / "nowhere.png") is None


def test_name_omits_the_default_variant(make_record: Make) -> None:
    def name(**fields: str) -> str:
        (board,) = measured_boards([(Path("a.json"), make_record(**fields))])
        row: Row = board.rows[0]
        return row.name

    assert (name(), name(variant=""), name(variant="T = 8")) == ("SDDPM", "SDDPM", "SDDPM, T = 8")


def test_record_without_neurons_or_checkpoint(make_record: Make) -> None:
    record = make_record(checkpoint=None)
    cost = replace(record.cost, firing_rate=None, firing_rates={}, energy_paper_mj=None, images_per_second=None)
    (board,) = measured_boards([(Path("a.json"), replace(record, cost=cost))])
    (row,) = board.rows
    assert [row.cells[name].value for name in ("T", "Rate", "Images/s")] == [None, None, None]
    assert row.details[0].facts["Checkpoint"] == "none"
    assert row.details[0].facts["Energy"] == "8.49 mJ by arithmetic-45nm"
