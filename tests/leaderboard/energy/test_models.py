from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from counts_by_hand import COUNTS, PICOJOULE, QUANTISED, SPIKING, STEM, costing

from leaderboard.energy import ARITHMETIC, FOLDER, LOCKED, Band, EnergyModel, _read, read_model, read_models
from leaderboard.locked import read_locked
from leaderboard.record.counts import NeuronCounts
from leaderboard.record.entries import PACKAGED, read_records


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("arithmetic-45nm", "b34eeaf604edfc5300b7f0a18ed326fb8a77b410de5bcef4d985562ac918224a"),
        ("folded-45nm", "98f76f9108e1afc71a8c26f7a595943894a030449fa4ad130ebb61dd2b4ee835"),
        ("unfolded-45nm", "5be8742166ac051c7d84fe5f738b8895207dfa0942280a53fd4524d9547da776"),
        ("neurobench-45nm", "26e7ffaa6a4911bb20ff83eddb483dfd3ed1f5a193a13bbfb5c57466b4da446e"),
        ("quantised-45nm", "d029c1dc690f3220637869ba3287f91ee8d010b60aec7f4f0677351dc3c0bad2"),
        ("memory-45nm", "d4f14379601be36c45651f8ac878ae9f827e5fba0e23c0e3d8d1d9b0f690a5ec"),
        ("paper-sddpm", "d9d584de0f6334369814cd233b60c7da602afd50850b5484109e2ab8bbd45397"),
    ],
)
def test_published_models_never_change(name: str, sha256: str) -> None:
    """A changed model needs a new name, a new lock and a new line here."""
    assert read_model(name).sha256 == LOCKED[name] == sha256
    assert replace(read_model(name), title="other").sha256 != sha256
    with pytest.raises(FrozenInstanceError):
        read_model(name).title = "other"  # type: ignore[misc]


def test_every_file_is_locked_and_every_name_can_be_chosen() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(LOCKED) == set(read_models())
    assert next(iter(read_models())) == ARITHMETIC
    for model in read_models().values():
        assert model.sources
        assert len(model.about.split()) > 20


def test_unknown_model_is_named_with_the_known_ones() -> None:
    message = r"'horowitz' is not an energy model; expected one of: arithmetic-45nm, folded-45nm, .*paper-sddpm"
    with pytest.raises(ValueError, match=message):
        read_model("horowitz")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mac_pj: 4.6", "mac_pj: 4.5", r"was changed: .* Energy models are immutable: .* under a new name"),
        ("operations: strict", "operations: dense", r"is not an energy model \(operations: expected 'strict' or"),
        ("ac_pj: 0.9", "", r"is not an energy model \(float32\.ac_pj: the field is missing\)"),
    ],
)
def test_edited_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "arithmetic-45nm.yaml"
    text = (FOLDER / "arithmetic-45nm.yaml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=rf"arithmetic-45nm\.yaml {message}"):
        read_locked(EnergyModel, path, LOCKED, "an energy model")


def test_model_without_numbers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "none-1nm.yaml"
    path.write_text((FOLDER / "arithmetic-45nm.yaml").read_text().split("float32")[0].replace(ARITHMETIC, path.stem))
    found = replace(read_model(ARITHMETIC), name=path.stem, float32=None)
    monkeypatch.setitem(LOCKED, path.stem, found.sha256)
    with pytest.raises(ValueError, match="needs either float32 or integer"):
        _read(path)


def test_new_model_needs_a_file_and_its_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "half-7nm.yaml"
    text = (FOLDER / "arithmetic-45nm.yaml").read_text().replace(ARITHMETIC, path.stem)
    path.write_text(text.replace("mac_pj: 4.6", "mac_pj: 2.3").replace("ac_pj: 0.9", "ac_pj: 0.45"))
    monkeypatch.setitem(LOCKED, path.stem, "not yet")
    with pytest.raises(ValueError, match="expected not yet") as error:
        _read(path)
    monkeypatch.setitem(LOCKED, path.stem, str(error.value).split("has the hash ")[1][:64])
    old, new = read_model(ARITHMETIC).energy(costing()), _read(path).energy(costing())
    assert old is not None
    assert new == pytest.approx([old.low / 2] * 2)


def test_arithmetic_by_hand() -> None:
    expected = (4.6 * 1500 + 0.9 * 1100) * PICOJOULE
    assert read_model(ARITHMETIC).energy(costing()) == Band(pytest.approx(expected), pytest.approx(expected))


def test_arithmetic_equals_the_committed_records() -> None:
    """The model replaces the constants of the strict count, so it must not move a single published number."""
    entries, broken = read_records([PACKAGED])
    costs = [record.cost for _, record in entries if record.cost is not None]
    assert not broken
    assert len(costs) > 30
    for cost in costs:
        band = read_model(ARITHMETIC).energy(cost)
        assert band is not None
        assert band.low == band.high == pytest.approx(cost.energy_strict_mj, rel=1e-13)


def test_effective_operations_by_hand() -> None:
    band = read_model("neurobench-45nm").energy(costing())
    assert band == pytest.approx([(4.6 * (800 + 300) + 0.9 * 900) * PICOJOULE] * 2)


def test_integers_by_hand() -> None:
    band = read_model("quantised-45nm").energy(costing())
    narrow = 0.2 * (4 / 8) ** (math.log(3.1 / 0.2) / math.log(4))  # 8-bit weight, 2-bit activation: 4 bits
    leak = 0.2 * (16 / 8) ** (math.log(3.1 / 0.2) / math.log(4))  # 8-bit constant, 32-bit membrane: 16 bits
    layers = 800 * (0.2 + 0.1) + 900 * 0.1 + 300 * (narrow + 0.1)
    neurons = 40 * (leak + 2 * 0.1) + 8 * 0.1
    assert band == pytest.approx([(layers + neurons + 60 * 0.1) * PICOJOULE] * 2)


def test_memory_by_hand() -> None:
    band, arithmetic = (read_model(name).energy(costing()) for name in ("memory-45nm", "quantised-45nm"))
    assert band is not None
    assert arithmetic is not None
    weights = 8 * (20 + 50 + 20) * 10  # bits
    inputs = 2 * (8 * 100 + 1 * 400 + 2 * 100)
    lower = (weights + inputs) * 10 / 64 + 2 * 8 * 40 * 10 / 64
    upper = (weights + inputs) * 2600 / 64 + 2 * 32 * 40 * 20 / 64
    upper += 8 * (800 + 900 + 300) * 100 / 64 + (8 * 800 + 2 * 300 + 2 * 32 * 900) * 20 / 64
    assert band.low == pytest.approx(arithmetic.low + lower * PICOJOULE)
    assert band.high == pytest.approx(arithmetic.high + upper * PICOJOULE)


def test_input_of_spikes_and_real_values_has_the_mean_width() -> None:
    """A quarter of the connections carry spikes of 1 bit, the others values of 8 bits."""
    mixed = replace(STEM, spike_dense=250, macs=750)
    traffic = read_model("memory-45nm").memory
    integer = read_model("memory-45nm").integer
    assert traffic is not None
    assert integer is not None
    only = replace(COUNTS, layers={"mixed": mixed}, neurons={})
    bits = 8 * 20 * 10 + 2 * 100 * (0.25 * 1 + 0.75 * 8)
    assert traffic.lower.energy_pj(only, integer) == pytest.approx(bits * 10 / 64)


def test_formula_of_sddpm_by_hand() -> None:
    band = read_model("paper-sddpm").energy(costing())
    expected = 4.6 * 1000 + 0.9 * (1000 + 0.25 * 500)  # mean rate 1000 / 4000 for the layer without spikes
    assert band == pytest.approx([expected * PICOJOULE] * 2)
    ann = replace(COUNTS, layers={"stem": STEM, "quantised": QUANTISED}, neurons={})
    assert read_model("paper-sddpm").energy(costing(ann)) == pytest.approx([4.6 * 1500 * PICOJOULE] * 2)


def test_records_without_counts_have_only_the_energy_of_totals() -> None:
    cost = costing(counts=None)
    found = {name: model.energy(cost) for name, model in read_models().items()}
    assert found.pop(ARITHMETIC) == read_model(ARITHMETIC).energy(costing())
    assert found.pop("paper-sddpm") == Band(0.5, 0.5)
    assert set(found.values()) == {None}
    assert "no operations by layer" in read_model("memory-45nm").missing(cost)
    assert "not defined" in read_model("paper-sddpm").missing(replace(cost, energy_paper_mj=None))
    assert read_model("paper-sddpm").energy(replace(cost, energy_paper_mj=None)) is None
    assert read_model(ARITHMETIC).energy(None) is None
    assert read_model(ARITHMETIC).missing(None) == "no cost is stated"
    assert read_model("memory-45nm").missing(costing()) == ""


def test_formula_of_sddpm_needs_a_rate() -> None:
    without = replace(COUNTS, layers={"stem": STEM})
    assert read_model("paper-sddpm").energy(costing(without)) is None
    assert "no rate" in read_model("paper-sddpm").missing(costing(without))


def test_more_spikes_cost_more_by_every_model() -> None:
    spiking = replace(SPIKING, sops=2000, acs=2100, effective_acs=1800, folded_acs=2100, unfolded_acs=2100)
    busy = replace(
        COUNTS,
        layers=COUNTS.layers | {"spiking": spiking},
        neurons={"neuron": NeuronCounts(updates=40, spikes=16, leaks=40)},
    )
    for model in read_models().values():
        quiet, loud = model.energy(costing()), model.energy(replace(costing(busy), acs=2100))
        assert quiet is not None
        assert loud is not None
        assert quiet.low < loud.low
        assert quiet.high < loud.high
        assert quiet.low <= quiet.high


def test_zeros_of_an_ann_are_free_and_its_width_matters() -> None:
    ann = replace(COUNTS, layers={"layer": STEM}, neurons={}, additions={})
    sparse = replace(ann, layers={"layer": replace(STEM, effective_macs=400)})
    narrow = replace(ann, layers={"layer": replace(STEM, input_bits=4)})
    effective, integers = read_model("neurobench-45nm"), read_model("quantised-45nm")
    assert effective.energy(costing(sparse)) == pytest.approx([4.6 * 400 * PICOJOULE] * 2)
    by_bits = [integers.energy(costing(counts)) for counts in (narrow, ann)]
    assert None not in by_bits
    assert by_bits[0] < by_bits[1]  # type: ignore[operator]


def test_folding_moves_multiply_accumulates_to_accumulates() -> None:
    """A layer behind pooled spikes: 1,000 MACs, or 300 accumulates if the pooling folds into its weights."""
    pooled = replace(STEM, folded_macs=0, folded_acs=300)
    shifted = replace(SPIKING, unfolded_macs=2000, unfolded_acs=0)
    cost = costing(replace(COUNTS, layers={"pooled": pooled, "shifted": shifted}))
    by_hand = {"folded-45nm": 0.9 * (300 + 1100), "unfolded-45nm": 4.6 * (1000 + 2000), ARITHMETIC: 4600 + 0.9 * 1100}
    for name, picojoules in by_hand.items():
        assert read_model(name).energy(cost) == pytest.approx([picojoules * PICOJOULE] * 2)


def test_only_neurons_that_leak_pay_for_it() -> None:
    leaky = costing(COUNTS)
    without = costing(replace(COUNTS, neurons={"neuron": NeuronCounts(updates=40, spikes=8, leaks=0)}))
    model = read_model("quantised-45nm")
    found, less = model.energy(leaky), model.energy(without)
    assert found is not None
    assert less is not None
    assert model.integer is not None
    assert found.low - less.low == pytest.approx(40 * model.integer.leak * PICOJOULE)
