from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from benchmark.cli import main
from benchmark.commands.regress import METHODS, Job, Outcome, _jobs, _measure, _update, compare
from leaderboard.record.records import MetricValue, Record
from leaderboard.regression import Baseline, read_baseline
from systems import spiking_diffusion
from systems.diffusion import absorbing
from systems.diffusion.gaussian import GaussianDiffusion
from systems.fsddim import FSDDIM
from systems.ops.quantise import Quantise
from systems.spiking import multistep

pytestmark = pytest.mark.slow

MakeRecord = Callable[..., Record]
SHIPPED = Path("leaderboard/data/baselines")
TINY = ("--trainer.max_steps=1", "--model.num_inference_steps=1", "--data.sample_batch_size=500")
SPIKING = ("sddpm", "sdm", "fsddim", "spiking_diffusion", "spiking_rwkv")


@pytest.fixture
def make_record() -> MakeRecord:
    """Makes a record of another distance and training seed than a real one has."""
    template = read_baseline(SHIPPED / "sdm").records[0]

    def make(fd: float, seed: int = 0, **fields: Any) -> Record:
        metrics = {"fd_digits": MetricValue(fd, 0.1, 2000)}
        return replace(template, metrics=metrics, seeds={"training": seed, "sampling": 0}, **fields)

    return make


@pytest.fixture
def baseline(make_record: MakeRecord) -> Baseline:
    """Mean 10, tolerance 4."""
    return Baseline([make_record(9.0, 0), make_record(10.0, 1), make_record(11.0, 2)])


def shown(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize(
    ("distance", "failed", "words"),
    [(9.0, False, "9.00 (=) │ ok"), (13.9, False, "(+4.90) │ ok"), (14.1, True, "WORSE"), (5.9, False, "better: why?")],
)
def test_worse_fails_and_better_does_not(
    baseline: Baseline, make_record: MakeRecord, distance: float, failed: bool, words: str
) -> None:
    outcomes = {"sdm": [Outcome("sdm", 0, make_record(distance))]}
    table, bad = compare(outcomes, {"sdm": baseline})
    assert bad is failed
    assert words in shown(table)
    assert "│ 10.00 (sd 1.00) │ 14.00 │" in shown(table)


def test_a_layer_that_is_counted_otherwise_fails(baseline: Baseline, make_record: MakeRecord) -> None:
    """A layer counted with real-valued inputs, for example: the distance does not change."""
    record = make_record(10.0)
    changed = replace(record, cost=replace(record.cost, macs=record.cost.macs + 3))
    table, bad = compare({"sdm": [Outcome("sdm", 0, changed)]}, {"sdm": baseline})
    assert bad
    assert re.search(r"the same network has another cost: MACs: [\d,]+, but [\d,]+ in the baseline", shown(table))


def test_what_failed_or_differs_fails_beside_what_is_fine(baseline: Baseline, make_record: MakeRecord) -> None:
    other = make_record(10.0, config={"model": {"init_args": {"num_steps": 8}}})
    results = [make_record(10.0), None, other]
    outcomes = {
        name: [Outcome(name, 0, record, "failed: no spikes")]
        for name, record in zip(("sddpm", "sdm", "spiking_rwkv"), results, strict=True)
    }
    table, bad = compare(outcomes, dict.fromkeys(outcomes, baseline))
    assert bad
    lines = [line for line in shown(table).splitlines() if line.startswith("│ s")]
    assert [line.split("│")[-2].strip()[:30] for line in lines] == [
        "ok",
        "failed: no spikes",
        "not comparable: model.init_arg",
    ]


def test_networks_that_share_a_base_share_a_job() -> None:
    jobs = list(_jobs(["sdm", "fsddim", "sddpm"], [3, 4], Path("x"), ["--a"]))
    assert jobs[:2] == [
        Job("sddpm", ("sddpm", "sdm"), 3, Path("x/sddpm-seed3"), ("--a",)),
        Job("fsddim", ("fsddim",), 3, Path("x/fsddim-seed3"), ("--a",)),
    ]
    (job,) = _jobs(["ann_snn"], [0], Path("x"), [])
    assert job[:2] == ("ddpm", ("ann_snn",))


def test_a_job_fine_tunes_what_it_has_trained(tmp_path: Path) -> None:
    (outcome,) = _measure(Job("sddpm", ("sdm",), 5, tmp_path / "job", TINY))
    assert outcome.record is not None, outcome.error
    assert (outcome.record.method, outcome.seed) == ("sdm", 5)
    assert outcome.record.seeds["training"] == 5
    (config,) = (tmp_path / "job" / "sdm").glob("*/config.yaml")
    start = Path(yaml.safe_load(config.read_text())["model"]["init_args"]["init_from"])
    assert start.is_relative_to(tmp_path / "job" / "sddpm")
    assert start.is_file()


def test_a_method_that_breaks_is_reported_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, images: Tensor, generator: object = None) -> Tensor:
        raise RuntimeError("no spikes")

    monkeypatch.setattr(GaussianDiffusion, "loss", broken)
    outcomes = _measure(Job("sddpm", ("sddpm", "sdm"), 0, tmp_path / "job", TINY))
    assert [o.error for o in outcomes] == ["failed, see its log.txt: RuntimeError: no spikes"] * 2
    assert "Traceback" in (tmp_path / "job" / "log.txt").read_text()


def test_new_baselines_are_written_unless_a_seed_failed(make_record: MakeRecord, tmp_path: Path) -> None:
    good = [Outcome("sdm", k, make_record(10.0 + k, k)) for k in range(3)]
    bad = [*good[:2], Outcome("spiking_rwkv", 2, None, "failed")]
    assert _update({"sdm": good, "spiking_rwkv": bad}, tmp_path, Console(width=200))
    assert sorted(read_baseline(tmp_path / "sdm").values) == [10, 11, 12]
    assert not (tmp_path / "spiking_rwkv").exists()


def test_a_command_that_cannot_work_ends_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"sdm has 0 records, .* regress --update --methods sdm"):
        main(["regress", "--methods", "sdm", f"--baselines={tmp_path}"])
    with pytest.raises(ValueError, match="--update --seeds 0 1: a standard deviation needs 3 seeds or more"):
        main(["regress", "--update", "--seeds", "0", "1"])
    with pytest.raises(SystemExit):
        main(["regress", "--methods", "gan"])
    assert "invalid choice: 'gan'" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_shipped_baselines_are_clean_and_far_from_untrained(method: str) -> None:
    baseline = read_baseline(SHIPPED / method)
    assert len(baseline.values) >= 3
    assert baseline.mean + baseline.tolerance < 40  # untrained networks lie near 80
    for record in baseline.records:
        assert not record.draft
        assert record.code.git_dirty is False
        assert not record.config["trainer"]["default_root_dir"].startswith("/")
        assert baseline.differences(record) == []


# Faults that the check must find


def without_surrogate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient passes a spike, nor a quantised activation."""
    monkeypatch.setattr(multistep, "surrogate_derivative", lambda spike_grad, dtype: torch.zeros_like)
    backward = Quantise.backward
    monkeypatch.setattr(Quantise, "backward", staticmethod(lambda ctx, grad: backward(ctx, torch.zeros_like(grad))))


def wrong_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler takes the betas for ten times what they were in training, or reveals all codes at once.

    SpikingRWKV predicts x_0, which hides that: for it they are a tenth.
    """

    def faulty(trajectory: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Tensor]]:
        def sample(self: GaussianDiffusion | FSDDIM, *args: object) -> Iterator[Tensor]:
            owner = self.scheduler if isinstance(self, GaussianDiffusion) else self
            right = owner.alphas_cumprod
            betas = 1 - right / torch.cat([right.new_ones(1), right[:-1]])
            factor = 0.1 if self.method == "spiking-rwkv" else 10
            owner.alphas_cumprod = (1 - (factor * betas).clamp(max=0.999)).cumprod(0)
            try:
                yield from trajectory(self, *args)
            finally:
                owner.alphas_cumprod = right

        return sample

    for system in (GaussianDiffusion, FSDDIM):
        monkeypatch.setattr(system, "trajectory", faulty(system.trajectory))

    def at_once(denoiser: object, masked: Tensor, uniforms: Iterator[Tensor], *args: object) -> Iterator[object]:
        return absorbing.unmask(denoiser, masked, (u * torch.tensor([0, 1]).view(2, 1, 1) for u in uniforms), *args)

    monkeypatch.setattr(spiking_diffusion, "unmask", at_once)


def check(method: str, folder: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["regress", "--methods", method, "--workers=1", f"--output={folder}"])
    assert stop.value.code == 1


def test_a_wrong_noise_schedule_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_schedule(monkeypatch)
    check("ddpm", tmp_path)
    assert "WORSE" in capsys.readouterr().out


@pytest.mark.regress
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", [without_surrogate, wrong_schedule])
def test_every_method_is_guarded(
    method: str, fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    check(method, tmp_path)
