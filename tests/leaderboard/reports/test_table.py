from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from leaderboard.protocols import OFFLINE_V1, OFFLINE_V2, OFFLINE_V3, STANDARD_V1
from leaderboard.record.entries import Entry
from leaderboard.record.records import Artefact, Dataset, Design, MetricValue, Record, TrainingData, write_record
from leaderboard.reports.boards import measured_boards
from leaderboard.reports.methods import Method, tables
from leaderboard.reports.seeds import result_rows
from leaderboard.reports.table import (
    SHORT_ROWS,
    leaderboard,
    markdown,
    short_rows,
    show_result,
    table_provenance,
    table_title,
)

Make = Callable[..., Record]
LONG = "a name of fifty letters, which no table can show whole"


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_rows_are_ranked_and_drafts_come_last(make_record: Make) -> None:
    records = [
        (Path("draft.json"), make_record(fd=0.1, draft=True, method="Draft")),
        (Path("b.json"), make_record(fd=2.0, method="Second")),
        (Path("a.json"), make_record(fd=1.0, method="First")),
        (Path("c.json"), make_record(method="NoMetric", metrics={})),
    ]
    header, *body = rows(markdown(records))
    assert [row[:2] for row in body] == [["1-2", "First"], ["1-2", "Second"], ["-", "NoMetric"], ["draft", "Draft"]]
    assert header[-1] == "Record"
    assert [row[-1] for row in body] == ["a.json", "b.json", "c.json", "draft.json"]


def test_transfer_is_listed_behind_the_ranked_rows_with_its_reason(make_record: Make) -> None:
    trained = (TrainingData("mnist", "a" * 64),)
    records = [
        (Path("best.json"), make_record(fd=0.5, method="Elsewhere", training_data=trained)),
        (Path("a.json"), make_record(fd=1.0, method="First")),
        (Path("draft.json"), make_record(fd=0.1, draft=True, method="Draft", training_data=trained)),
    ]
    text = markdown(records)
    assert [row[:2] for row in rows(text)[1:]] == [["1", "First"], ["transfer", "Elsewhere\\*"], ["draft", "Draft\\*"]]
    assert "\\* transfer: trained on mnist (aaaaaaaa), evaluated on digits." in text


def test_headline_metric_determines_the_rank(make_record: Make) -> None:
    """Not the smallest of several Fréchet distances, which may use another matrix root in each row."""
    value = make_record().metrics["fd_digits"]
    pairs = {"first": (9.0, None), "second": (9.5, 8.0), "third": (10.0, 5.0)}
    records = []
    for name, (fid, root) in pairs.items():
        metrics = {"fid": replace(value, value=fid)}
        metrics |= {} if root is None else {"fid_newton_schulz": replace(value, value=root)}
        records.append((Path(f"{name}.json"), make_record(method=name, metrics=metrics)))
    _, *body = rows(markdown(records))
    assert [row[1] for row in body] == list(pairs)


def test_columns_and_number_formats(make_record: Make) -> None:
    header, row = rows(markdown([(Path("a.json"), make_record())]))
    cells = dict(zip(header, row, strict=True))
    assert cells["fd\\_digits"] == "1.500 (±0.024)"
    assert cells["T"] == "4"
    assert cells["Solver"] == "ddim"
    assert cells["NFE"] == "50"
    assert cells["Rate"] == "0.123"
    assert cells["G SOPs"] == "3.2"
    assert cells["45 nm arithmetic, mJ"] == "8.49"
    assert cells["M params"] == "63.5"
    assert cells["Images/s"] == "12.3"
    assert cells["Samples"] == "2,000"


def test_a_method_that_is_not_the_published_one_says_so(make_record: Make) -> None:
    records = [make_record(method="spiking-rwkv"), make_record(method="sddpm")]
    text = markdown((Path(f"{i}.json"), record) for i, record in enumerate(records))
    assert [row[1] for row in rows(text)[1:]] == ["spiking-rwkv\\*", "sddpm"]
    assert "not SDiT as released" in text
    assert "as released" not in markdown([(Path("b.json"), make_record(method="sddpm"))])


@pytest.mark.parametrize(("scale", "shown"), [(1.0, "(conditional)"), (2.5, "(conditional, guidance 2.5)")])
def test_conditional_results_are_marked_in_every_table(make_record: Make, scale: float, shown: str) -> None:
    record = make_record(method="sdit", conditional=scale, fd=1.0)
    text = markdown([(Path("a.json"), record), (Path("b.json"), make_record(method="sddpm"))])
    assert [row[1] for row in rows(text)[1:]] == [f"sdit {shown}\\*", "sddpm"]
    assert "generates images of given classes" in text
    method = Method((Entry(Path("a.json"), record),))
    assert method.name == f"sdit {shown}"
    (board,) = measured_boards([(Path("a.json"), record)])
    assert board.rows[0].name == f"sdit {shown}"
    assert "generates images of given classes" in board.footnotes[0]
    (row,) = result_rows([method])
    assert str(row["Method"]) == f"sdit {shown}*"


def test_network_without_neurons_shows_no_steps(make_record: Make) -> None:
    record = make_record()
    record = replace(record, num_steps=1, cost=replace(record.cost, firing_rate=None, firing_rates={}))
    header, row = rows(markdown([(Path("a.json"), record)]))
    cells = dict(zip(header, row, strict=True))
    assert (cells["T"], cells["Rate"]) == ("-", "-")


def test_inception_metrics_have_their_usual_names(make_record: Make) -> None:
    metrics = {
        "is_mean": MetricValue(8.123, 0.11, 50_000),
        "kid_mean": MetricValue(0.00321, 0.00045, 10_000),
        "fid": MetricValue(19.736, 0.21, 50_000, "singular covariance: ..."),
    }
    text = markdown([(Path("a.json"), make_record(protocol=STANDARD_V1, metrics=metrics))])
    header, row = rows(text)
    assert header[3:6] == ["FID", "1000 KID", "IS"]
    assert row[3:6] == ["19.74\\* (±0.41)", "3.21 (±0.88)", "8.12 (±0.22)"]
    assert "\\* singular covariance" in text


def test_incomparable_records_never_share_a_table(make_record: Make) -> None:
    records = [
        make_record(),
        make_record(variant="same table"),
        make_record(protocol=STANDARD_V1),
        make_record(dataset=Dataset("mnist", "f" * 64, "hub")),
        make_record(dataset=Dataset("digits", "e" * 64, "other content")),
        make_record(extractor=Artefact("digits", "c" * 64)),
    ]
    text = markdown((Path(f"{i}.json"), record) for i, record in enumerate(records))
    assert text.count("\n## ") == 5
    assert len(rows(text)) == 5 + 6


def test_markdown_is_deterministic_and_escaped(make_record: Make) -> None:
    first = (Path("a.json"), make_record(method="a|b_*c*", variant="<x>\n`y`"))
    second = (Path("b.json"), make_record())
    text = markdown([first, second])
    assert text == markdown([second, first])
    assert r"| a\|b\_\*c\* | \<x\> \`y\` |" in text


def test_terminal_fits_104_columns_and_names_the_files(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {
        "fid": MetricValue(19.736, 0.21, 50_000),
        "kid_mean": MetricValue(0.01321, 0.00045, 10_000),
        "is_mean": MetricValue(8.123, 0.11, 50_000),
        "precision": MetricValue(0.6123, 0.0045, 10_000),
        "recall": MetricValue(0.4321, 0.0065, 10_000),
    }
    path = write_record(make_record(protocol=STANDARD_V1, metrics=metrics, method="SpikingDiffusion"), tmp_path)
    design = Design("track-v1", "0123456789")
    write_record(make_record(method="Short", solver="[red]", design=design), tmp_path / "a" / "records")
    leaderboard([str(tmp_path)], wide=True, all=True)
    out = capsys.readouterr().out
    tables = [line for line in out.splitlines() if not line.startswith(("One row", "Reference", "["))]
    assert max(map(len, tables)) <= 104
    for part in (
        "19.74",
        "(±0.41)",
        "FID",
        "Prec.",
        "0.6123",
        "Seeds",
        "SpikingDiffusion",
        "Short",
        "[red]",
        "fd",
        "_digits",
        path.name,
        ", design track-v1 (01234567)",
    ):
        assert part in out


def test_output_file(make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(make_record(), tmp_path / "records")
    output = tmp_path / "docs" / "table.md"
    leaderboard([str(tmp_path)], str(output))
    assert output.read_text() == markdown([(path, make_record())])
    assert f"wrote {output}" in capsys.readouterr().out


def test_broken_record_is_named_and_the_rest_shown(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(make_record(), tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(SystemExit) as error:
        leaderboard([str(tmp_path)])
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert "broken.json: field checkpoint: the field is missing" in out
    assert "SDDPM" in out


def test_no_records_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaderboard([str(tmp_path)], str(tmp_path / "out.md"))
    assert "An evaluation writes one: python -m benchmark test --config" in capsys.readouterr().out
    assert not (tmp_path / "out.md").exists()


def test_missing_folder_is_named_unless_it_is_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"^--records .*nowhere: not a folder; give folders to search, such as"):
        leaderboard([str(tmp_path), str(tmp_path / "nowhere")])
    monkeypatch.chdir(tmp_path)
    leaderboard()


def test_protocol_of_other_content_under_the_same_name_is_another_table(make_record: Make) -> None:
    changed = replace(OFFLINE_V1, sample_seed=7)
    text = markdown([(Path("a.json"), make_record()), (Path("b.json"), make_record(protocol=changed))])
    assert text.count("\n## ") == 2


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs the command in a pipe of unknown width and returns its output lines."""
    monkeypatch.delenv("COLUMNS")

    def run(folder: Path, **options: bool) -> list[str]:
        leaderboard([str(folder)], **options)
        return capsys.readouterr().out.splitlines()

    return run


def new_run(folder: Path, record: Record) -> Path:
    """Writes a record to a run folder of its own and returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    path = write_record(record, folder / "records")
    (folder / "samples").mkdir()
    (folder / "samples" / f"{path.stem}.png").touch()
    return folder


def table_lines(lines: list[str]) -> list[str]:
    """Returns the lines without paths, which are not wrapped."""
    return [line for line in lines if not line.startswith(("samples: ", "tensorboard "))]


def test_short_table_has_one_line_per_row_and_marks_the_newest_run(
    make_record: Make, tmp_path: Path, short: Callable[..., list[str]]
) -> None:
    write_record(make_record(fd=1.0, method="DDPM", created="2026-01-01T00:00:00+00:00"), tmp_path / "data" / "records")
    new_run(tmp_path / "old", make_record(fd=3.0, seeds={"training": 1}))
    run = new_run(tmp_path / "new", make_record(fd=2.0, variant="tdBN", created="2025-02-02T00:00:00+00:00"))
    title, header, *body = short(tmp_path)
    assert title == "digits, offline-v1: best fd_digits first, > is the newest run"
    assert header.split() == ["#", "Method", "fd_digits", "T", "Rate", "NFE", "arithmetic", "mJ", "Seeds"]
    assert [line.split() for line in body[:3]] == [
        ["1-3", "DDPM", "1.000", "(±0.024)", "4", "0.123", "50", "8.49", "1"],
        [">", "1-3", "SDDPM,", "tdBN", "2.000", "(±0.024)", "4", "0.123", "50", "8.49", "1"],
        ["1-3", "SDDPM", "3.000", "(±0.024)", "4", "0.123", "50", "8.49", "1"],
    ]
    assert body[3] == "(±): 95 %, of the evaluation; single seeds share all ranks"
    assert body[4] == "--wide: every column"
    assert body[5].startswith(f"samples: {run}/samples/")
    assert body[6:] == [f"tensorboard --logdir {run}"]


@pytest.mark.parametrize("options", [{}, {"all": True}])
def test_long_names_and_numbers_are_cropped(
    options: dict[str, bool], make_record: Make, tmp_path: Path, short: Callable[..., list[str]]
) -> None:
    record = make_record(method=LONG, variant=LONG, nfe=10**17, created="2025-02-02T00:00:00+00:00")
    record = replace(record, cost=replace(record.cost, macs=1e21))
    new_run(tmp_path / "run", record)
    write_record(make_record(), tmp_path)
    write_record(make_record(dataset=Dataset(LONG, "f" * 64, "hub"), metrics={LONG: MetricValue(1, 0.1, 9)}), tmp_path)
    write_record(make_record(dataset=Dataset(LONG[1:], "f" * 64, "hub"), metrics={}), tmp_path)
    lines = table_lines(short(tmp_path, **options))
    assert len(lines) == (13 if options else 6)  # titles, headers, rows and the meaning of ±, or one table and its hint
    assert max(map(len, lines)) <= 80
    assert "…" in next(line for line in lines if line.startswith(">"))


def test_other_tables_are_hidden_and_named(make_record: Make, tmp_path: Path, short: Callable[..., list[str]]) -> None:
    new_run(tmp_path / "run", make_record(created="2025-02-02T00:00:00+00:00"))
    write_record(make_record(dataset=Dataset("mnist", "f" * 64, "hub")), tmp_path)
    write_record(make_record(protocol=STANDARD_V1), tmp_path)
    lines = short(tmp_path)
    assert "--wide: every column  --all: 2 more tables (standard-v1, mnist)" in lines
    assert sum("best fd_digits first" in line for line in lines) == 1
    lines = short(tmp_path, all=True)
    titles = [line.split(":")[0] for line in lines if "best fd_digits first" in line]
    assert titles == ["digits, offline-v1", "digits, standard-v1", "mnist, offline-v1"]
    assert sum(line.startswith(">") for line in lines) == 1
    assert not any("--all" in line for line in lines)
    assert any("Reference:" in line for line in short(tmp_path, wide=True))


def test_without_runs_the_table_of_most_rows_is_shown(
    make_record: Make, tmp_path: Path, short: Callable[..., list[str]]
) -> None:
    write_record(make_record(created="2025-02-02T00:00:00+00:00"), tmp_path)
    for fd in (1.0, 2.0):
        write_record(make_record(fd=fd, variant=f"{fd}", dataset=Dataset("mnist", "f" * 64, "hub")), tmp_path)
    title, _, *body = short(tmp_path)
    assert title == "mnist, offline-v1: best fd_digits first"
    assert body[3:] == ["--wide: every column  --all: 1 more table (digits)"]


def test_a_draft_is_last_with_the_reason_for_its_star(
    make_record: Make, tmp_path: Path, short: Callable[..., list[str]]
) -> None:
    metrics = {"fd_digits": MetricValue(0.5, 0.1, 60, "few images")}
    new_run(tmp_path / "run", make_record(draft=True, metrics=metrics))
    write_record(make_record(), tmp_path)
    lines = short(tmp_path)
    assert lines[3].split()[:4] == [">", "draft", "SDDPM", "0.50*"]
    assert lines[4] == "* few images"


def test_seeds_share_a_line_and_the_newest_run_is_marked_among_them(
    make_record: Make, tmp_path: Path, short: Callable[..., list[str]]
) -> None:
    for seed, fd in ((1, 2.9), (2, 3.1)):
        write_record(make_record(fd=fd, seeds={"training": seed}), tmp_path / "data" / "records")
    run = make_record(fd=3.6, seeds={"training": 0}, created="2026-02-02T00:00:00+00:00")
    write_record(make_record(fd=9.0, method="SDM"), tmp_path / "data" / "records")
    new_run(tmp_path / "new", run)
    _, _, *body = short(tmp_path)
    assert [line.split() for line in body[:3]] == [
        [">", "1-2", "SDDPM", "3.20", "±0.90", "4", "0.123", "50", "8.49", "3"],
        [">", "seed", "0", "3.600", "(±0.024)", "4", "0.123", "50", "8.49"],
        ["1-2", "SDM", "9.000", "(±0.024)", "4", "0.123", "50", "8.49", "1"],
    ]
    assert body[3] == "±: 95 % over seeds, in parentheses of one evaluation; equal ranks: cannot tell"
    assert body[4] == "--wide: every column  --all: seeds"
    assert [line.split()[:3] for line in short(tmp_path, all=True)[3:6]] == [
        [">", "seed", "0"],
        ["seed", "1", "2.900"],
        ["seed", "2", "3.100"],
    ]
    wide = "\n".join(short(tmp_path, wide=True))
    assert wide.count("seed ") == 3
    assert wide.count(".json") == 4


def test_seeds_that_can_be_told_apart_have_ranks_of_their_own(make_record: Make) -> None:
    records = []
    for method, mean in (("Best", 1.0), ("Second", 3.0), ("Twin", 3.0)):
        for seed, noise in enumerate((-0.02, 0.01, 0.0, 0.02, -0.01)):
            value = mean + (-noise if method == "Twin" else noise) * (2 if method == "Best" else 1)
            records.append(make_record(fd=value, method=method, seeds={"training": seed}))
    text = markdown((Path(f"{i}.json"), record) for i, record in enumerate(records))
    _, *body = rows(text)
    found = {row[1]: row[0] for row in body if row[0]}
    assert found == {"Best": "1", "Second": "2-3", "Twin": "2-3"}
    assert [row[1] for row in body if not row[0]] == [f"seed {i}" for i in range(5)] * 3
    assert {row[-1] for row in body if row[0]} == {"5 records"}


@pytest.mark.parametrize("place", [None, 0, 3, SHORT_ROWS - 2, SHORT_ROWS - 1, 15, 18, 19])
def test_short_table_shows_the_first_rows_and_those_around_the_newest_run(place: int | None) -> None:
    rows = short_rows(20, place)
    assert len(rows) == SHORT_ROWS
    shown = [row for row in rows if row is not None]
    assert shown == sorted(set(shown))
    assert {0, 1, 2} <= set(shown)
    if place is not None:
        assert {max(0, place - 1), place} <= set(shown)
    previous = -1
    for row in [*rows, 20]:  # gaps only where rows are missing
        if row is not None:
            assert row == previous + 1 or previous == -2
        previous = -2 if row is None else row
    assert short_rows(SHORT_ROWS, None) == list(range(SHORT_ROWS))


def test_a_result_is_wrapped_between_values(make_record: Make, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"fd_digits": MetricValue(1.5, 0.012, 2000, "a note")}
    show_result(Entry(Path("runs/a/records/b.json"), make_record(draft=True, metrics=metrics)), Console(width=50))
    assert capsys.readouterr().out.splitlines() == [
        "digits, offline-v1 (draft, not ranked):",
        "fd_digits 1.500* (±0.024), T 4, rate 0.123,",
        "50 NFE, 8.49 mJ (arithmetic)",
        "* a note",
        "in runs/a:",
        "  records/b.json",
        "  samples/b.png",
    ]


def test_an_incomplete_cost_is_marked(make_record: Make) -> None:
    record = make_record()
    incomplete = replace(record, variant="FFT", cost=replace(record.cost, incomplete={"mixer [_fft_r2c]": 3}))
    text = markdown([(Path("a.json"), incomplete), (Path("b.json"), record)])
    header, first, second = rows(text)
    column = header.index("45 nm arithmetic, mJ")
    assert first[column] == f"{second[column]}\\*"
    assert "lower bound: it lacks the products of mixer" in text


def test_the_newest_protocol_of_a_dataset_comes_first_and_faults_are_named(make_record: Make) -> None:
    records = [
        replace(record, dataset=replace(record.dataset, name=name))
        for record in (make_record(protocol=protocol) for protocol in (OFFLINE_V1, OFFLINE_V3, OFFLINE_V2))
        for name in ("mnist", "digits")
    ]
    found = [group[0].record for group in tables((Path(f"{k}.json"), record) for k, record in enumerate(records))]
    order = [(name, protocol.name) for name in ("digits", "mnist") for protocol in (OFFLINE_V3, OFFLINE_V2, OFFLINE_V1)]
    assert [(record.dataset.name, record.protocol.name) for record in found] == order
    noted = [table_title(record) for record in found if "unrepresentative" in table_provenance(record)]
    assert noted == ["mnist, offline-v2"]
