"""Known sets stand beside the methods that were measured in the same way, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leaderboard.files import canonical_sha256
from leaderboard.pictures import grid, save_png
from leaderboard.protocols import OFFLINE_V2
from leaderboard.record.entries import PACKAGED, Entry, read_records
from leaderboard.record.records import Artefact, Record, write_record
from leaderboard.reports.boards import measured_boards
from leaderboard.reports.cells import Cell
from leaderboard.reports.known_sets import FOLDER, known_set_rows
from leaderboard.reports.page import render_page
from leaderboard.reports.published import read_published
from leaderboard.reports.seeds import seeds
from leaderboard.reports.table import leaderboard, markdown
from leaderboard.validation.anchors import read_anchors

Make = Callable[..., Record]


@pytest.fixture
def record(make_record: Make) -> Record:
    """A record with reference, protocol and extractors of the committed anchors of the digits."""
    found = read_anchors(FOLDER / "digits-offline-v2.json")
    real = found.sets[0]
    networks = dict(network.rsplit(" ", 2)[:2] for network in found.networks)
    record = make_record(protocol=OFFLINE_V2, metrics=dict(real.metrics))
    extractor = Artefact(" + ".join(networks), canonical_sha256(networks))
    return replace(record, dataset=replace(record.dataset, fingerprint=found.fingerprint), extractor=extractor)


def test_known_sets_follow_the_methods(record: Record) -> None:
    (board,) = measured_boards([(Path("a.json"), record)])
    method, *known = board.rows
    assert [row.source for row in known] == ["known"] * len(known)
    assert len({row.method for row in known}) == len(known) == 7
    assert known[0].method == "real test images (297 images)"  # fewer than the protocol asks for
    for name in ("fd_unbiased_digits_ae", "Cov.", "Dens."):
        assert str(known[0].cells[name]) == str(method.cells[name])  # the record has the values of real images
    assert all(row.cells["#"].value is None for row in known)
    assert len(board.plots) == 0  # they have no energy


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_sets_stand_beside_the_committed_records(path: Path) -> None:
    name, protocol = path.stem.split("-", 1)
    records = [record for _, record in read_records([PACKAGED])[0]]
    tables = [record for record in records if (record.dataset.name, record.protocol.name) == (name, protocol)]
    for record in tables:  # of CIFAR-10 and Fashion-MNIST there are none yet
        assert known_set_rows(record, {"Method": Cell("")}), record.method
    assert tables or path.stem not in ("digits-offline-v2", "mnist-offline-v2")


@pytest.mark.parametrize("part", ["dataset", "extractor", "protocol"])
def test_sets_that_do_not_compare_are_left_out(record: Record, part: str) -> None:
    fields = {
        "dataset": replace(record.dataset, fingerprint="e" * 64),
        "extractor": replace(record.extractor, sha256="c" * 64),
        "protocol": replace(record.protocol, sha256="d" * 64),
    }
    (board,) = measured_boards([(Path("a.json"), replace(record, **{part: fields[part]}))])
    assert [row.source for row in board.rows] == ["measured"]


def test_known_sets_are_in_the_results(record: Record, tmp_path: Path) -> None:
    write_record(record, tmp_path / "records")
    seeds([str(tmp_path)], str(tmp_path / "out"))
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert text.count("| known set | ") == 7
    assert "| known set | real test images (297 images) | - | - |" in text


def test_nearest_training_images_are_shown_beside_the_samples(record: Record, tmp_path: Path) -> None:
    path = write_record(record, tmp_path / "records")
    entry = Entry(path, record)
    images = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    save_png(grid(images, columns=8, scale=8), entry.samples)
    without = render_page([(path, record)], read_published())
    save_png(grid(images.flip(0), columns=8, scale=8), entry.nearest)
    shown = render_page([(path, record)], read_published())
    assert "nearest training images" not in without
    assert shown.count("nearest training images, in the same order") == 1
    assert "known set" in shown


def test_tables_in_the_terminal_and_in_markdown_show_known_sets(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(record, tmp_path / "records")
    assert markdown([(tmp_path, record)]).count("| known set |") == 7
    for options, shown in (({}, 1), ({"all": True}, 5), ({"wide": True}, 5)):
        leaderboard([str(tmp_path)], **options)
        words = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert sum(f" {name}" in words for name in ("real", "blurred,", "shifted,", "noise,", "overlays,")) == shown
