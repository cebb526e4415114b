from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from counts_by_hand import COUNTS, STEM, costing
from rich.console import Console

from leaderboard.energy import Band, read_model, read_models
from leaderboard.protocols import OFFLINE_V2
from leaderboard.record.entries import Entry
from leaderboard.record.records import MetricValue, Record, write_record
from leaderboard.reports.boards import measured_boards
from leaderboard.reports.energies import ALL_MODELS, ENERGY, all_models, band_cell, energy
from leaderboard.reports.energy import cheapest, energy_rows, energy_table
from leaderboard.reports.methods import Method, fold
from leaderboard.reports.page import render_page
from leaderboard.reports.published import read_published
from leaderboard.reports.render import to_csv, to_json
from leaderboard.reports.seeds import result_rows
from leaderboard.reports.table import leaderboard, markdown, table_rows

Make = Callable[..., Record]
ANN = replace(
    COUNTS, layers={"stem": replace(STEM, macs=4000, dense=4000, effective_macs=500)}, neurons={}, additions={}
)


@pytest.fixture
def records(make_record: Make) -> list[tuple[Path, Record]]:
    """A spiking method and an ANN with operations by layer, and an older spiking method without."""
    ann = replace(costing(ANN), macs=4000, acs=0, firing_rate=None, firing_rates={}, energy_strict_mj=4000 * 4.6e-9)
    made = [
        make_record(fd=1.0, method="ddpm", cost=ann, num_steps=1),
        make_record(fd=2.0, method="sddpm", cost=costing()),
        make_record(fd=3.0, method="older"),
    ]
    return [(Path(f"{record.method}.json"), record) for record in made]


def test_a_band_is_shown_with_two_digits_for_each_bound() -> None:
    assert str(band_cell(Band(0.0451, 12.34))) == "0.045-12"
    assert str(band_cell(Band(0.5, 1234.0))) == "0.5-1,234"
    assert str(band_cell(Band(1.001, 1.002))) == "1"  # bounds that look equal
    assert str(band_cell(Band(0.1234, 0.1234))) == "0.123"
    assert str(band_cell(None)) == "-"
    assert band_cell(Band(0.1, 10.0)).value == pytest.approx(1.0)


def test_energy_of_seeds_is_their_mean(make_record: Make) -> None:
    double = replace(COUNTS, layers={name: replace(n, macs=2 * n.macs) for name, n in COUNTS.layers.items()})
    made = [make_record(cost=costing(c), seeds={"training": i}) for i, c in enumerate((COUNTS, double))]
    (method,) = fold([Entry(Path(f"{i}.json"), record) for i, record in enumerate(made)])
    assert energy(method, read_model("arithmetic-45nm")) == pytest.approx([(4.6 * 2250 + 0.9 * 1100) * 1e-9] * 2)


def test_band_of_all_models_contains_each_model(records: list[tuple[Path, Record]]) -> None:
    methods = {path.stem: Method((Entry(path, record),)) for path, record in records}
    assert all_models(methods["older"]) is None
    for name in ("ddpm", "sddpm"):
        band = all_models(methods[name])
        found = [energy(methods[name], model) for model in read_models().values()]
        assert band is not None
        assert None not in found
        assert band.low == min(f.low for f in found if f)
        assert band.high == max(f.high for f in found if f)


def test_tables_without_operations_by_layer_show_the_arithmetic_alone(make_record: Make) -> None:
    old = [(Path("a.json"), make_record())]
    text = markdown(old)
    assert "45 nm arithmetic, mJ" in text
    assert ALL_MODELS not in text
    assert "strict count, without memory access" in text
    (method,) = fold([Entry(*old[0])])
    (row,) = table_rows([method])
    assert str(row[ENERGY]) == "8.49"
    memory = markdown(old, read_model("memory-45nm"))
    assert "45 nm memory, mJ" in memory
    assert "45 nm arithmetic, mJ" not in memory
    assert "by the model memory-45nm" in memory
    assert "45 nm memory, mJ: the record has no operations by layer; test again with this version" in memory


def test_tables_with_operations_by_layer_show_a_band_and_the_chosen_model(records: list[tuple[Path, Record]]) -> None:
    methods = fold([Entry(*pair) for pair in records])
    for name, model in read_models().items():
        rows = {str(row["Method"]): row for row in table_rows(methods, model)}
        method = next(method for method in methods if method.record.method == "sddpm")
        assert str(rows["sddpm"][ENERGY]) == str(band_cell(model.energy(method.record.cost)))
        assert str(rows["sddpm"][ALL_MODELS]) == str(band_cell(all_models(method)))
        assert str(rows["older"][ALL_MODELS]) == "-"
        columns = list(rows["sddpm"])
        assert columns[columns.index("T") :][:4] == ["T", "Rate", ENERGY, ALL_MODELS], name
    (header, *_) = [line for line in markdown(records).splitlines() if line.startswith("| \\#")]
    assert "| 45 nm arithmetic, mJ | mJ, all models |" in header
    assert ALL_MODELS in result_rows(methods)[0]


def write(folder: Path, records: list[tuple[Path, Record]]) -> list[str]:
    for _, record in records:
        write_record(record, folder)
    return [str(folder)]


def test_terminal_shows_the_band_and_the_chosen_model_in_80_columns(
    records: list[tuple[Path, Record]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = write(tmp_path, records)
    leaderboard(folder)
    title, header, *body = capsys.readouterr().out.splitlines()
    assert max(map(len, (title, header, *body))) <= 80
    assert title.endswith(", \N{DAGGER} arithmetic")
    assert ALL_MODELS in header
    band = band_cell(all_models(Method((Entry(*records[0]),))))
    assert f" {band} " in next(line for line in body if " ddpm " in line)
    assert " 8.49\N{DAGGER} " in next(line for line in body if " older " in line)
    leaderboard(folder, energy="memory-45nm")
    out = capsys.readouterr().out
    assert "memory mJ" in out
    assert ALL_MODELS not in out
    assert "- in 45 nm memory, mJ: the record has no operations by layer" in out.replace("\n", " ")
    leaderboard(folder, wide=True, energy="neurobench-45nm")
    assert "effective mJ" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'horowitz' is not an energy model; expected one of: arithmetic-45nm"):
        leaderboard(folder, energy="horowitz")


def test_long_names_of_metrics_leave_room_for_methods(
    make_record: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    metrics = {"fd_unbiased_digits_ae": MetricValue(18.53, 1.2, 5000)}
    record = make_record(protocol=OFFLINE_V2, metrics=metrics, method="spiking-rwkv", cost=costing())
    leaderboard(write(tmp_path, [(Path("a.json"), record)]))
    title, first, second, row, *_ = capsys.readouterr().out.splitlines()
    assert "best fd_unbiased_digits_ae first" in title
    assert "fd_unbiased " in first
    assert " _digits_ae " in second
    assert "spiking-rwkv " in row


def test_methods_by_models_name_who_costs_least_under_each(records: list[tuple[Path, Record]]) -> None:
    methods = fold([Entry(*pair) for pair in records])
    rows = energy_rows(methods)
    assert [str(row["Method"]) for row in rows] == ["ddpm", "sddpm", "older"]
    assert [str(row["T"]) for row in rows] == ["-", "4", "4"]
    assert set(read_models()) < set(rows[0])
    assert str(rows[2]["memory-45nm"]) == "-"
    arithmetic, *others, depends = cheapest(methods)
    (effective,) = (line for line in others if line.startswith("neurobench"))
    assert arithmetic == "arithmetic-45nm: sddpm costs least, 7.89e-06 mJ."
    assert effective == (
        "neurobench-45nm: ddpm costs least, 2.3e-06 mJ, of the 2 of 3 methods that have an energy by it."
    )
    assert depends == "Which method costs least depends on the model."


def test_least_by_every_model_and_by_one_bound_are_said(make_record: Make) -> None:
    def methods(first: object, second: object) -> list[Method]:
        made = [make_record(method="a", cost=first), make_record(method="b", cost=second)]
        return fold([Entry(Path(f"{record.method}.json"), record) for record in made])

    layers = {name: replace(n, macs=2 * n.macs, acs=2 * n.acs, effective_macs=2e4) for name, n in COUNTS.layers.items()}
    twice = {
        n: replace(x, dense=2 * x.dense, spike_dense=2 * x.spike_dense, sops=2 * x.sops) for n, x in layers.items()
    }
    more = replace(COUNTS, layers=twice)
    assert cheapest(methods(costing(), costing(more)))[-1] == "a costs least by every model."
    busy = replace(COUNTS, layers={"stem": replace(STEM, effective_macs=1e6, calls=0, inputs=0)}, neurons={})
    moving = replace(COUNTS, layers={"stem": replace(STEM, effective_macs=0, calls=0, inputs=5e4)}, neurons={})
    (memory,) = (line for line in cheapest(methods(costing(busy), costing(moving))) if line.startswith("memory"))
    assert memory == (
        "memory-45nm: b costs least by the lower bound (0.00013-0.033 mJ), a by the upper one (0.0003-0.015 mJ)."
    )


def test_command_shows_a_dataset_and_writes_it(
    records: list[tuple[Path, Record]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = write(tmp_path / "records", records), tmp_path / "energy.md"
    energy_table(folder, data="digits", output=str(output))
    out = capsys.readouterr().out
    assert "Which method costs least depends on the model." in out
    text = output.read_text()
    assert text.startswith("# Energy\n")
    assert "| Method | fd\\_digits | T | Rate | arithmetic-45nm | folded-45nm |" in text
    energy_table(folder, output=str(output))  # its own file is replaced
    with pytest.raises(ValueError, match=r"no record with a cost of mnist; there are records of: digits, offline-v1"):
        energy_table(folder, data="mnist")
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="--output"):
        energy_table(folder, output=str(output))
    assert output.read_text() == "mine"


def test_files_have_the_energy_of_every_model(records: list[tuple[Path, Record]]) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(records, read_published()))))
    spiking, older = (next(line for line in lines if line["method"] == name) for name in ("sddpm", "older"))
    band = read_model("memory-45nm").energy(costing())
    assert band is not None
    assert float(spiking["energy_memory-45nm_low_mj"]) == pytest.approx(band.low)
    assert float(spiking["energy_memory-45nm_high_mj"]) == pytest.approx(band.high)
    assert older["energy_memory-45nm_low_mj"] == ""
    assert float(older["energy_paper-sddpm_low_mj"]) == 5.25
    (table,) = json.loads(to_json(records, read_published()))["measured"]
    energies = {method["name"]: method["energy_mj"] for method in table["methods"]}
    assert energies["sddpm"]["memory-45nm"] == pytest.approx([band.low, band.high])
    assert energies["older"]["memory-45nm"] is None


def test_plots_have_an_axis_for_each_model_and_bars_of_bounds(records: list[tuple[Path, Record]]) -> None:
    (board,) = measured_boards(records)
    assert set(board.plots) == {"all models", *read_models()}
    wide, _ = board.plots["all models"]
    assert [mark.point.band is not None for mark in wide.marks] == [True, True, False]
    for mark in wide.marks:
        assert wide.frame.left <= mark.left <= mark.x <= mark.right <= wide.frame.right
    memory, _ = board.plots["memory-45nm"]
    assert len(memory.marks) == 2
    assert all(mark.left < mark.x < mark.right for mark in memory.marks)
    effective, _ = board.plots["neurobench-45nm"]
    assert all(mark.left == mark.x == mark.right for mark in effective.marks)
    assert "neurobench-45nm" in effective.energy_name


def test_page_without_operations_by_layer_offers_only_what_it_can_show(make_record: Make) -> None:
    html = render_page(
        [(Path("a.json"), make_record()), (Path("b.json"), make_record(fd=2, variant="b"))], read_published()
    )
    offered = html.split('<select id="energy">')[1].split("</select>")[0]
    assert 'value="arithmetic-45nm"' in offered
    assert 'value="paper-sddpm"' in offered
    assert offered.count("<option") == 2


def test_methods_by_models_fit_80_columns(
    records: list[tuple[Path, Record]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("leaderboard.reports.energy.terminal", lambda: Console(width=80))
    energy_table(write(tmp_path / "records", records), data="digits")
    _, *rest = capsys.readouterr().out.splitlines()
    table = rest[: next(i for i, line in enumerate(rest) if line.startswith("arithmetic-45nm:"))]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    names = ("sddpm", "ddpm", "older")
    assert all(any(line.startswith(name) for line in table) for name in names)
