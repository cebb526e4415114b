"""The committed records are consistent and match the committed tables. CI builds the page from them."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmark.cli import main
from benchmark.commands.ablate_sdit import VARIANTS, _spread, _values
from leaderboard.add import find_problems
from leaderboard.record.entries import RECORDS, Entry
from leaderboard.record.records import find_records, read_record
from leaderboard.reports.seeds import FIGURES

DATA = Path("leaderboard/data")
RESULTS = Path("leaderboard/RESULTS.md")


def test_committed_records_are_consistent_and_have_samples() -> None:
    paths = find_records([RECORDS])
    assert paths
    for path in paths:
        record = read_record(path)
        assert find_problems(record) == []
        assert not record.draft
        assert record.code.git_dirty is False
        assert Entry(path, record).samples.is_file()


def test_committed_repetitions_agree() -> None:
    entries = [Entry(path, read_record(path)) for path in find_records([RECORDS])]
    kept = sorted(Path(RECORDS).with_name("repetitions").rglob("*.json"))
    agreeing = [entry.repetition for entry in entries if entry.repeated]
    agreeing += [entry.verification(name) for entry in entries for name in entry.verified]
    assert kept == sorted(agreeing)


def test_committed_tables_match_the_records(tmp_path: Path) -> None:
    main(["leaderboard", "render", f"--records=[{RECORDS}]", f"--output={tmp_path}"])
    assert (tmp_path / "leaderboard.md").read_text() == (DATA / "leaderboard.md").read_text()
    for name in ("index.html", "leaderboard.csv", "leaderboard.json"):  # built by CI, not committed
        assert (tmp_path / name).stat().st_size > 0
        assert not (DATA / name).exists()


def test_committed_means_match_the_records(tmp_path: Path) -> None:
    main(["leaderboard", "seeds", f"--records=[{RECORDS}]", f"--output={tmp_path}"])
    assert (tmp_path / "RESULTS.md").read_text() == RESULTS.read_text()
    for figure in (tmp_path / FIGURES).iterdir():
        assert (RESULTS.parent / FIGURES / figure.name).is_file()


@pytest.mark.parametrize("folder", sorted((DATA / "ablations").iterdir()), ids=lambda folder: folder.name)
def test_committed_ablations_match_their_table(folder: Path) -> None:
    page = Path("systems/README.md").read_text().splitlines()
    records = sorted(map(read_record, find_records([folder])), key=lambda record: record.seeds["training"] or 0)
    assert not any(record.draft or record.code.git_dirty for record in records)
    runs = {name: [record for record in records if record.variant.startswith(f"{name}, seed")] for name in VARIANTS}
    for name, of_variant in runs.items():
        pairs = zip(_values(of_variant), _values(runs["full"]), strict=True)
        against = "-" if name == "full" else _spread([value - full for value, full in pairs])
        cost = [record.counted_cost for record in of_variant]
        rate = statistics.mean(c.firing_rate or 0.0 for c in cost)
        energy = statistics.mean(c.energy_strict_mj for c in cost)
        assert f"| {name} | {_spread(_values(of_variant))} | {against} | {rate:.3f} | {energy:.3g} |" in page
