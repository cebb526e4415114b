"""`python -m benchmark break-even` on records in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmark.cli import main
from leaderboard.energy import Band, read_model, read_models
from leaderboard.energy.break_even import ALWAYS, NEVER, BreakEven
from leaderboard.files import canonical_sha256
from leaderboard.record.counts import LayerCounts, NeuronCounts, OperationCounts
from leaderboard.record.records import Cost, Dataset, Record, write_record
from leaderboard.reports.break_even_report import in_words, sentences

MakeRecord = Callable[..., Record]

REAL = LayerCounts(1, 50, 50, 32, 100, 75, 10_000, 0, 0, 10_000, 0, 6_000, 0, 10_000, 0, 10_000, 0, 9_000, 0, 0)
SPIKES = LayerCounts(
    1, 50, 50, 1, 400, 300, 40_000, 40_000, 8_000, 0, 8_300, 0, 7_000, 0, 8_300, 0, 8_300, 36_000, 3, 3
)


def cost(rate: float | None, **layers: LayerCounts) -> Cost:
    neurons = {} if rate is None else {"neuron": NeuronCounts(400, 400 * rate, 400)}
    counts = OperationCounts(dict(layers), neurons, {}, "stem", 240)
    sops, macs, acs = (sum(getattr(layer, name) for layer in layers.values()) for name in ("sops", "macs", "acs"))
    rates = {} if rate is None else {"neuron": rate}
    return Cost(60, 60, 10, rate, rates, sops, macs, acs, 1.0, None, counts=counts)


SPIKING = cost(0.2, stem=REAL, body=SPIKES)
TWIN = cost(None, stem=REAL, body=REAL)


@pytest.fixture
def pair(make_record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Writes two records, with the fields given for the one or the other, and returns the options."""
    monkeypatch.chdir(tmp_path)
    made = {"method": "sddpm", "nfe": 10, "cost": SPIKING}
    other = {"method": "sddpm-relu-twin", "nfe": 10, "num_steps": 1, "cost": TWIN}

    def write(spiking: dict[str, Any] | None = None, twin: dict[str, Any] | None = None) -> list[str]:
        first = write_record(make_record(**made | (spiking or {})), tmp_path / "spiking" / "records")
        second = write_record(make_record(**other | (twin or {})), tmp_path / "twin" / "records")
        return ["break-even", f"--spiking={first}", f"--twin={second}"]

    return write


def test_table_plot_and_verdict(pair: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """By the arithmetic: 46,000 + 0.9 (300 + 40,000 rate) = 92,000 pJ, above a rate of 1; by effective operations
    4.6 * 6,000 + 0.9 * 35,000 rate = 4.6 * 12,000 at 27,600 / 31,500.
    """
    pair()
    main(["break-even", "--spiking", "spiking", "--twin", "twin"])
    shown = capsys.readouterr().out
    lines = {line.split()[1]: line.split("│")[1:-1] for line in shown.splitlines() if "│ " in line}
    assert set(read_models()) <= lines.keys()
    cells = [cell.strip() for cell in lines["neurobench-45nm"]]
    assert cells[4:] == ["0.200", f"{27_600 / 31_500:.3f}"]
    assert lines["arithmetic-45nm"][-1].strip() == "always"
    assert "spiking: sddpm, digits, 10 NFE, T = 4, firing rate 0.200; fd_digits 1.500" in shown
    assert "twin: sddpm-relu-twin, digits, 10 NFE; fd_digits" in shown
    assert "At the measured rate spiking costs less by arithmetic-45nm" in shown
    with Image.open("break-even.png") as image:
        assert image.size[0] > 1000
    main(["break-even", "--spiking", "spiking", "--twin", "twin"])
    assert len(list(Path.cwd().glob("break-even*.png"))) == 2  # nothing is overwritten


def test_newest_record_of_a_folder(
    pair: Callable[..., list[str]], make_record: MakeRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    options = pair()
    later = replace(SPIKING, firing_rate=0.1)
    fields = {"method": "sddpm", "nfe": 10, "cost": later, "created": "2026-01-02T03:04:05+00:00"}
    write_record(make_record(**fields), Path("spiking/records"))
    main(["break-even", "--spiking=spiking", options[2], "--output=plots/a.png"])
    assert "firing rate 0.100" in capsys.readouterr().out
    assert Path("plots/a.png").is_file()
    with pytest.raises(FileExistsError, match="--output"):
        main(["break-even", "--spiking=spiking", options[2], "--output=plots/a.png"])


@pytest.mark.parametrize(("bits", "noted"), [(32, True), (2, True), (3, False)])
def test_twin_of_other_bits_is_noted(
    bits: int, noted: bool, pair: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model": {"class_path": "SDDPM", "init_args": {"activation_bits": bits}}}
    main(pair(twin={"config": config, "config_sha256": canonical_sha256(config)}))
    note = f"activations have {bits} bits; 3 bits have at least as many levels as a neuron has spike"
    assert (note in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    ("spiking", "twin", "message"),
    [
        ({"cost": replace(SPIKING, counts=None)}, {}, "no operations by layer, as written by an earlier version; eval"),
        ({}, {"cost": replace(TWIN, counts=None)}, "no operations by layer"),
        ({"cost": TWIN}, {}, "has no neurons; give it as --twin"),
        ({"cost": replace(SPIKING, firing_rate=0.0)}, {}, "never fires"),
        ({}, {"cost": SPIKING}, "has neurons; a twin has none"),
        ({}, {"dataset": Dataset("mnist", "f" * 64, "hub")}, "different datasets, digits .* and mnist"),
        ({}, {"nfe": 20}, "different numbers of network evaluations, 10 .* and 20"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(
    spiking: dict[str, Any], twin: dict[str, Any], message: str, pair: Callable[..., list[str]]
) -> None:
    with pytest.raises(ValueError, match=message):
        main(pair(spiking, twin))
    assert not list(Path.cwd().glob("*.png"))


@pytest.mark.parametrize(("name", "message"), [("nothing", "does not exist; give a record"), (".", "no record")])
def test_missing_records(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"--spiking {name}.*{message}"):
        main(["break-even", f"--spiking={name}", "--twin=."])


def test_both_networks_are_needed() -> None:
    with pytest.raises(ValueError, match="give --spiking RECORD and --twin RECORD"):
        main(["break-even", "--spiking=runs"])


def test_bounds_that_disagree_are_said() -> None:
    memory = read_model("memory-45nm")
    row = BreakEven(memory, 0.2, Band(1, 10), Band(2, 20), Band(3, 15))
    assert sentences([row]) == ["At the measured rate the bounds disagree by memory-45nm."]
    assert in_words(row.rates, "{:.2f}".format) == "0.40 / 0.10"
    assert row.rates != (NEVER, ALWAYS)
