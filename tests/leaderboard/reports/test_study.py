"""The section of `RESULTS.md` on a study says only what follows from its records and trainings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmark.cli import main
from leaderboard.files import canonical_sha256
from leaderboard.record.entries import Entry
from leaderboard.record.records import Dataset, MetricValue, Record, read_record, record_name, write_record
from leaderboard.reports import study
from leaderboard.reports.study import find_studies, read_results

Make = Callable[..., Record]
DESIGN = {"name": "study-v1", "sha256": "d" * 64}
STEPS = {"500": "1" * 64, "1000": "2" * 64}


@pytest.fixture
def measured(make_record: Make, tmp_path: Path) -> Callable[..., None]:
    """Writes one training with its records: the last weights, and drafts by the name of their measurement."""

    def write(
        method: str, seed: int, fd: float, energy: float = 8.0, dataset: str = "digits", **drafts: tuple[float, int]
    ) -> None:
        config = {
            "seed_everything": seed,
            "method": method,
            "evaluation": {"root": f"place {seed}", "new_option": seed},
        }
        base = make_record(
            fd=fd,
            method=method.partition("_")[0],
            config=config,
            config_sha256=canonical_sha256(config),
            seeds={"training": seed},
            nfe=10,
            dataset=Dataset(dataset, "f" * 64, "made for the test"),
        )
        base = replace(base, metrics={k.replace("digits", dataset): v for k, v in base.metrics.items()})
        assert base.cost is not None
        if method == "spiking-diffusion":
            base = replace(base, metrics=base.metrics | {"reconstruction_mse": MetricValue(0.1, 0.01, 500)})
        base = replace(base, cost=replace(base.cost, energy_strict_mj=energy, nfe=10))
        path = write_record(base, tmp_path / "data/records")
        records = {"final-1000": path.name}
        for key, (value, nfe) in drafts.items():
            metrics = {f"fd_{dataset}": MetricValue(value, 0.01, 500)}
            draft = replace(base, metrics=metrics, nfe=nfe, draft=True, solver=key)
            records[key.replace("_", "-")] = write_record(draft, tmp_path / "data/curves/study-v1/records").name
        content = {"design": DESIGN, "method": method, "dataset": dataset, "seed": seed, "images": 32_000}
        content["chosen"] = {"learning_rate": 0.01, "averaged": method != "ddpm"}
        content |= {"cpu_seconds": 1800 + 3600 * seed, "checkpoints": STEPS, "records": records}
        folder = tmp_path / "data/curves/study-v1/trainings"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{method}_{dataset}-seed{seed}.json").write_text(json.dumps(content))

    return write


def section(tmp_path: Path) -> str:
    """Renders the results and returns the section of the study."""
    main(["leaderboard", "seeds", f"--records=[{tmp_path / 'data/records'}]", f"--output={tmp_path / 'out'}"])
    text = (tmp_path / "out/RESULTS.md").read_text()
    return text.split("## Study study-v1")[1].split("\n## ")[0]


def table(text: str, title: str) -> list[list[str]]:
    """Returns the cells of the table below a title, without its header."""
    lines = [line for line in text.split(f"### {title}")[1].split("###")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_curves_have_every_measured_number_of_images(measured: Callable[..., None], tmp_path: Path) -> None:
    measured("sddpm", 0, 3.0, curve_500=(9.0, 10))
    measured("sddpm", 1, 5.0)
    measured("ddpm", 0, 1.0, curve_500=(2.0, 10))
    measured("spiking-diffusion", 0, 9.0)
    rows = table(section(tmp_path), "digits: fd\\_digits against images seen")
    assert [row[0] for row in rows] == ["ddpm", "sddpm", "spiking-diffusion"]  # the best first
    assert rows[0][1:] == [
        "2.000 (±0.020)",
        "1.000 (±0.024)",
        "plain",
        "1",
        "0.5",
        "25.6",
    ]  # 8 mJ / 10 evaluations x 32,000
    # seeds may differ in folders and new options
    assert rows[1][1:] == ["9.000 (±0.020)", "4 ±13", "averaged", "2", "0.5", "25.6"]  # hours of the first seed
    assert rows[2][1:] == [
        "-",
        "9.000 (±0.024)",
        "averaged",
        "1",
        "0.5",
        "-",
    ]  # of two networks, which are trained in turn
    assert (tmp_path / "out/data/figures/study-v1-curves-digits.png").is_file()


def test_answers_test_the_seeds_and_compare_the_energy(measured: Callable[..., None], tmp_path: Path) -> None:
    for seed in range(3):
        measured("sddpm", seed, 3.0 + 0.01 * seed, energy=4.0)
        measured("ddpm", seed, 1.0 + 0.02 * seed, energy=8.0)
        measured("sdm", seed, (2.0, 3.0, 4.5)[seed], energy=4.0)
    measured("fsddim", 0, 2.0, energy=1.0)
    questions = "- question: What does spiking cost?\n  pairs: [[ddpm, sddpm], [sddpm, sdm]]\n"
    questions += "- question: And this?\n  pairs: [[sddpm, fsddim], [sddpm, missing]]\n"
    (tmp_path / "data/curves/study-v1/questions.yaml").write_text(questions)
    rows = table(section(tmp_path), "digits: Answers")
    assert [row[0] for row in rows] == ["What does spiking cost?", "", "And this?"]
    assert [row[1:3] for row in rows] == [["ddpm", "sddpm"], ["sddpm", "sdm"], ["sddpm", "fsddim"]]
    assert rows[0][3] == "+1.99 ±0.02"
    assert [row[5] for row in rows] == ["0.5", "1", "0.25"]
    assert [row[7] for row in rows] == ["ddpm is better", "cannot tell", "cannot tell: one shared seed"]
    assert float(rows[0][4]) < 0.05 < float(rows[1][4])
    assert rows[2][3:5] == ["-1.00", "-"]


def test_answers_use_the_seeds_that_both_methods_have(measured: Callable[..., None], tmp_path: Path) -> None:
    for seed, fd in enumerate((16.0, 10.0, 10.0)):
        measured("sddpm", seed, fd, energy=(4.0, 8.0, 8.0)[seed])
    measured("sddpm_t8", 0, 14.0, energy=8.0)
    measured("sdm", 3, 14.0)
    pairs = "[[sddpm, sddpm_t8], [sddpm, sdm]]"
    (tmp_path / "data/curves/study-v1/questions.yaml").write_text(f"- question: What?\n  pairs: {pairs}\n")
    (row,) = table(section(tmp_path), "digits: Answers")  # none for methods without a shared seed
    assert [*row[3:6], row[7]] == ["-2.00", "-", "2", "cannot tell: one shared seed"]


def test_later_pairs_never_withdraw_an_answer(measured: Callable[..., None], tmp_path: Path) -> None:
    def measure(method: str, *values: float) -> None:
        for seed, value in enumerate(values):
            measured(method, seed, value)

    questions = "- question: What?\n  pairs: [[ddpm, sddpm], [ddpm, sdm], [ddpm, fsddim]]\n"
    measure("ddpm", 1.0, 1.0, 1.0)
    measure("sddpm", 1.9, 2.0, 2.1)
    (tmp_path / "data/curves/study-v1/questions.yaml").write_text(questions)
    (first,) = table(section(tmp_path), "digits: Answers")
    assert first[7] == "ddpm is better"
    measure("sdm", 1.0, 2.0, 4.0)
    assert table(section(tmp_path), "digits: Answers")[0] == first
    measure("fsddim", 5.0, 5.01, 5.02)  # a smaller p, whose correction is larger
    second = table(section(tmp_path), "digits: Answers")[0]
    assert float(second[4]) < float(first[4])
    assert second[7] == first[7]
    assert "corrected for all 3 planned pairs" in section(tmp_path)


def test_pairs_with_and_without_spikes_have_a_break_even() -> None:
    results = read_results(Path("leaderboard/data/curves/track-v1"))
    lines = study.study_lines(results, lambda name, figure: "")
    rows = {tuple(row[:2]): row[2:] for row in table("\n".join(lines), "mnist: Break-even")}
    # as `break-even --spiking ... --twin ...` prints them
    expected = ["0.242", "always", "always", "always", "0.312", "0.170", "0.001 / never", "always"]
    assert rows["sddpm", "sddpm-relu-twin"] == expected
    assert ("sddpm", "sdit (conditional)") not in rows


def test_longer_chains_are_listed_beside_the_ranked_one(measured: Callable[..., None], tmp_path: Path) -> None:
    measured("sddpm", 0, 3.0, nfe50_1000=(2.5, 50), heun_1000=(2.8, 10))
    measured("ddpm", 0, 1.0)
    measured("sddpm", 1, 1.0)  # without a longer chain
    rows = table(section(tmp_path), "digits: More network evaluations")
    assert [row[:3] for row in rows] == [
        ["sddpm", "ddim, 10", "3.000 (±0.024)"],
        ["sddpm", "heun\\_1000, 10", "2.800 (±0.020)"],  # of another sampler
        ["sddpm", "nfe50\\_1000, 50", "2.500 (±0.020)"],
    ]
    (folder,) = find_studies([tmp_path / "data/records"])
    (sddpm,) = [member for member in read_results(folder).members if member.key == "sddpm"]
    assert sddpm.method.frechet == 2.0


def test_the_order_on_two_datasets_is_that_of_the_shared_seeds(measured: Callable[..., None], tmp_path: Path) -> None:
    for method, here, there in (("ddpm", 2.0, 20.0), ("sdm", 3.0, 10.0), ("sdit", 4.0, 40.0)):
        measured(method, 0, here)
        measured(method, 0, there, dataset="mnist")
    measured("sdit", 1, 0.1)  # by the mean of its seeds the first
    measured("sddpm", 0, 1.0)  # on one dataset only
    assert table(section(tmp_path), "Order on digits and mnist") == [
        ["ddpm", "1", "2"],
        ["sdm", "2", "1"],
        ["sdit", "3", "3"],
        ["Kendall's tau", "", "0.33"],
    ]


def test_one_method_on_two_datasets_has_no_order(measured: Callable[..., None], tmp_path: Path) -> None:
    measured("ddpm", 0, 2.0)
    measured("sdm", 0, 3.0)
    measured("ddpm", 0, 2.0, dataset="mnist")
    text = section(tmp_path)
    assert "mnist: fd\\_mnist against images seen" in text
    assert "Order on" not in text


def test_figures_mark_rows_of_one_colour_differently(measured: Callable[..., None], tmp_path: Path) -> None:
    for method in ("sddpm", "sddpm_t1", "sdm", "sddpm-relu-twin", "sddpm-relu-twin-3bit"):
        measured(method, 0, 1.0)
    (folder,) = find_studies([tmp_path / "data/records"])
    styles = study._styles(read_results(folder).members)
    assert len({json.dumps(style, sort_keys=True) for style in styles.values()}) == len(styles) == 5
    assert styles["sddpm"]["color"] == styles["sddpm_t1"]["color"] == styles["sddpm-relu-twin"]["color"]


def test_figures_show_the_points_and_cut_wide_intervals(measured: Callable[..., None], tmp_path: Path) -> None:
    for seed, fd in enumerate((3.0, 5.0)):
        measured("sddpm", seed, fd, **({} if seed else {"curve_500": (9.0, 10)}))
        measured("spiking-diffusion", seed, 2 * fd)
    (folder,) = find_studies([tmp_path / "data/records"])
    results = read_results(folder)
    styles = study._styles(results.members)
    assert study._energy_figure(results.members, styles).axes[0].get_ylim() == (2.0, 16.0)  # the means are 4 and 8
    last = {member.key: member.curve[member.images].frechet for member in results.members}
    assert last == {"sddpm": 3.0, "spiking-diffusion": 6.0}  # of the same seed in all curves


def test_a_training_whose_record_is_missing_is_an_error(measured: Callable[..., None], tmp_path: Path) -> None:
    measured("sddpm", 0, 3.0)
    (path,) = (tmp_path / "data/records").glob("*.json")
    path.unlink()
    (folder,) = find_studies([tmp_path / "data/records"])
    with pytest.raises(FileNotFoundError, match=rf"sddpm with seed 0 names the record {path.name}, which is not below"):
        read_results(folder)


def test_trainings_that_were_not_measured_are_left_out(measured: Callable[..., None], tmp_path: Path) -> None:
    measured("sddpm", 0, 3.0)
    measured("sdm", 0, 2.0)
    path = tmp_path / "data/curves/study-v1/trainings/sdm_digits-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"records": {}}))
    text = section(tmp_path)
    assert "sddpm" in text
    assert "sdm" not in text


def test_search_shows_what_was_tried_and_whether_the_choice_is_at_the_edge(
    measured: Callable[..., None], tmp_path: Path
) -> None:
    measured("sddpm", 0, 3.0)
    tried = [(0.001, False, 0.5), (0.001, True, 0.4), (0.002, False, None), (0.002, True, None)]
    names = ("learning_rate", "averaged", "validation_loss")
    content: dict[str, Any] = {"design": DESIGN, "tried": [dict(zip(names, entry, strict=True)) for entry in tried]}
    content["chosen"] = {"learning_rate": 0.001, "averaged": True}
    path = tmp_path / "data/curves/study-v1/search/sddpm_x.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    (row,) = table(section(tmp_path), "Search of learning rate and averaging")
    assert row == ["sddpm\\_x", "0.5 / 0.4", "not finite / not finite", "0.001, averaged, at the edge"]


def test_samples_are_shown_beside_their_nearest_training_images(measured: Callable[..., None], tmp_path: Path) -> None:
    measured("sddpm", 0, 3.0)
    (folder,) = find_studies([tmp_path / "data/records"])
    (path,) = (tmp_path / "data/records").glob("*.json")
    entry = Entry(path, read_record(path))
    assert path.name == record_name(entry.record)  # which trainings name
    entry.samples.parent.mkdir()
    for picture, grey in ((entry.samples, 80), (entry.nearest, 200)):
        page = np.full((81, 81), grey, np.uint8)
        page[40:] = 0  # of a grid of eight rows, only the first three are shown
        Image.fromarray(page).save(picture)
    ((_, (member,)),) = read_results(folder).by_dataset().items()
    figure = study.sample_figure([member])
    assert figure is not None
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [image.max() for image in shown] == [80, 200]
    assert [image.min() for image in shown] == [80, 200]
    assert "### digits: Samples" in section(tmp_path)
