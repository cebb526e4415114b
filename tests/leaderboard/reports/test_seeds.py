"""Records that differ only in their seed become one row of means and 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmark.cli import main
from leaderboard.files import canonical_sha256
from leaderboard.record.entries import Entry
from leaderboard.record.records import Artefact, ImageSet, Record, read_record, write_record
from leaderboard.reports.methods import fold
from leaderboard.reports.seeds import result_rows

Make = Callable[..., Record]


def trained(make_record: Make, fd: float, seed: int, num_steps: int = 4, **fields: object) -> Record:
    config = {
        "seed_everything": seed,
        "trainer": {"default_root_dir": f"runs/seed{seed}"},
        "model": {"init_args": {"num_steps": num_steps, "init_from": f"seed{seed}.ckpt"}},
    }
    seeds = {"sampling": 0, "training": seed}
    return make_record(fd=fd, config=config, config_sha256=canonical_sha256(config), seeds=seeds, **fields)


def test_seeds_share_a_row_and_other_options_do_not(make_record: Make) -> None:
    records = [trained(make_record, fd, seed) for seed, fd in enumerate((1.0, 2.0, 6.0))]
    records += [trained(make_record, 2.5, 0, num_steps=8)]
    rows = result_rows(fold([Entry(Path(f"{i}.json"), record) for i, record in enumerate(records)]))
    assert [str(row["Seeds"]) for row in rows] == ["1", "3"]  # best mean first
    assert [str(row["fd_digits"]) for row in rows] == ["2.500 (±0.024)", "3.0 ±6.6"]
    assert str(rows[1]["mJ"]) == "8.49"


def test_two_tests_of_one_training_count_once(make_record: Make) -> None:
    records = [trained(make_record, fd, seed) for seed, fd in ((0, 30.0), (0, 10.0), (1, 12.0))]
    records[0] = replace(records[0], created="2026-01-01T00:00:00Z")
    records[1] = replace(records[1], created="2026-01-02T00:00:00Z")
    (row,) = result_rows(fold([Entry(Path(f"{i}.json"), record) for i, record in enumerate(records)]))
    assert (str(row["Seeds"]), str(row["fd_digits"])) == ("2", "11 ±13")


def test_what_is_not_the_seed_is_another_row(make_record: Make) -> None:
    records = [
        trained(make_record, 1.0, 0),
        trained(make_record, 2.0, 1, variant="tdBN"),
        trained(make_record, 3.0, 2, solver="ddpm"),
        trained(make_record, 4.0, 3, method="SDM"),
        replace(trained(make_record, 0.5, 4), draft=True),
    ]
    rows = fold([Entry(Path(f"{i}.json"), record) for i, record in enumerate(records)])
    assert [(m.frechet, len(m.entries)) for m in rows] == [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1), (0.5, 1)]


def test_trainings_without_a_seed_differ_by_their_checkpoint(make_record: Make) -> None:
    weights = (Artefact("last.ckpt", letter * 64) for letter in "aab")
    entries = [Entry(Path(f"{i}.json"), make_record(fd=i, checkpoint=w)) for i, w in enumerate(weights)]
    (row,) = fold(entries)
    assert (len(row.entries), len(row.older), row.frechet) == (2, 1, 1.5)


def test_images_of_other_code_never_share_a_row(make_record: Make) -> None:
    sets = [ImageSet(letter * 64, 2000, 0, "folder") for letter in "ab"]
    entries = [Entry(Path(f"{i}.json"), make_record(images=made)) for i, made in enumerate(sets)]
    assert len(fold(entries)) == 2


def test_a_variant_is_named_without_its_seed(make_record: Make) -> None:
    records = [trained(make_record, 1.0, seed, variant="strictly spiking") for seed in range(2)]
    records += [trained(make_record, 2.0, seed, num_steps=8, variant=f"full, seed {seed}") for seed in range(2)]
    rows = result_rows(fold([Entry(Path(f"{i}.json"), record) for i, record in enumerate(records)]))
    assert [str(row["Method"]) for row in rows] == ["SDDPM, strictly spiking", "SDDPM, full"]


def test_a_method_that_is_not_the_published_one_says_so(make_record: Make, tmp_path: Path) -> None:
    write_record(trained(make_record, 1.0, 0, method="spiking-rwkv", variant="small"), tmp_path / "records")
    main(["leaderboard", "seeds", f"--records=[{tmp_path}]", f"--output={tmp_path / 'out'}"])
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "| 1 | spiking-rwkv, small\\* |" in text
    assert "45 nm arithmetic, mJ" in text
    assert "not SDiT as released" in text


def test_command_leaves_out_drafts_and_writes_table_and_plot(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, fd in enumerate((1.0, 3.0)):
        write_record(trained(make_record, fd, seed), tmp_path / "records")
    write_record(replace(trained(make_record, 100.0, 2), draft=True), tmp_path / "records")
    main(["leaderboard", "seeds", f"--records=[{tmp_path}]", f"--output={tmp_path / 'out'}"])
    assert "2 ±13" in capsys.readouterr().out
    assert "2 ±13" in (tmp_path / "out" / "RESULTS.md").read_text()
    plot = "data/figures/quality-energy-digits-offline-v1.png"
    assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")
    assert f"]({plot})" in (tmp_path / "out" / "RESULTS.md").read_text()


def test_samples_are_those_of_the_first_seed_of_each_row(make_record: Make, tmp_path: Path) -> None:
    runs = [("SDDPM", 2.0, 0, "default", 80), ("SDDPM", 1.0, 1, "default", 120), ("SDDPM", 0.5, 2, "longer", 160)]
    runs += [("SDM", 3.0, 0, "default", 200)]
    for method, fd, seed, variant, grey in runs:
        path = write_record(trained(make_record, fd, seed, method=method, variant=variant), tmp_path / "records")
        samples = Entry(path, read_record(path)).samples
        samples.parent.mkdir(exist_ok=True)
        Image.new("L", (40, 40), grey).save(samples)
    main(["leaderboard", "seeds", f"--records=[{tmp_path}]", f"--output={tmp_path / 'out'}"])
    with Image.open(tmp_path / "out" / "data" / "figures" / "samples-digits-offline-v1.png") as panels:
        seen = panels.convert("L").histogram()
    large = [grey for _, _, _, _, grey in runs if seen[grey] > 5000]
    assert large == [80, 160, 200]


def test_broken_record_is_named_and_the_others_are_shown(
    make_record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(trained(make_record, 1.0, 0), tmp_path / "records")
    (tmp_path / "records" / "broken.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main(["leaderboard", "seeds", f"--records=[{tmp_path}]"])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "broken.json" in shown
    assert "SDDPM" in shown
