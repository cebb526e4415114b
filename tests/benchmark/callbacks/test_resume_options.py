"""Options at resume: each takes effect or is refused, and the saved config says what happened."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SDDPM, fit
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, OneCycleLR

from benchmark.callbacks.resume import CPUTime, configure_optimizers
from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run
from systems.checkpoints import CheckpointMismatchError, load_checkpoint, save_checkpoint


def configured(optimizer: Any, schedule: Any = None, **options: Any) -> Any:
    built = optimizer([nn.Parameter(torch.ones(2))], **options)
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule(built)}} if schedule else built


def trained(configuration: Any, steps: int) -> dict[str, Any]:
    """The entries of a checkpoint after some steps."""
    optimizer: Optimizer = configuration["optimizer"] if isinstance(configuration, dict) else configuration
    schedules = [configuration["lr_scheduler"]["scheduler"]] if isinstance(configuration, dict) else []
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones(2)
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    return {
        "global_step": steps,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict() for schedule in schedules],
    }


def cosine(optimizer: Optimizer) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, T_max=20)


def longer(optimizer: Optimizer) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, T_max=40)


def warm_up(optimizer: Optimizer) -> LinearLR:
    return LinearLR(optimizer, 0.1, total_iters=10)


def decay(optimizer: Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, 0.9)


def by_function(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


CASES: dict[str, tuple[Any, Any, float]] = {
    "lr": (configured(Adam, lr=1e-3), configured(Adam, lr=1e-5), 1e-5),
    "lr of a schedule": (
        configured(Adam, cosine, lr=1e-3),
        configured(Adam, cosine, lr=1e-5),
        1e-5 * (1 + math.cos(math.pi * 5 / 20)) / 2,
    ),
    "length of a schedule": (
        configured(Adam, cosine, lr=1e-3),
        configured(Adam, longer, lr=1e-3),
        1e-3 * (1 + math.cos(math.pi * 5 / 40)) / 2,
    ),
    "class of a schedule": (configured(Adam, cosine, lr=1e-3), configured(Adam, decay, lr=1e-3), 1e-3 * 0.9**5),
    "schedule added": (configured(Adam, lr=1e-3), configured(Adam, warm_up, lr=1e-3), 1e-3 * 0.55),
    "schedule omitted": (configured(Adam, cosine, lr=1e-3), configured(Adam, lr=1e-3), 1e-3),
    "schedule of a function": (
        configured(Adam, by_function, lr=1e-3),
        configured(Adam, by_function, lr=6e-3),
        1e-3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_learning_rate_is_that_of_a_training_with_the_present_options(case: str) -> None:
    before, after, expected = CASES[case]
    checkpoint = trained(before, 5)
    assert configure_optimizers(checkpoint, after)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(expected, rel=1e-9)
    assert ("initial_lr" in group) == isinstance(after, dict)
    assert len(checkpoint["lr_schedulers"]) == isinstance(after, dict)


@pytest.mark.parametrize("schedule", [None, cosine, warm_up, decay, by_function, one_cycle])
def test_equal_options_change_no_bit(schedule: Any) -> None:
    checkpoint = trained(configured(Adam, schedule, lr=1e-3), 7)
    saved = [dict(checkpoint["optimizer_states"][0]["param_groups"][0]), [*map(dict, checkpoint["lr_schedulers"])]]
    assert configure_optimizers(checkpoint, configured(Adam, schedule, lr=1e-3)) == []
    assert [checkpoint["optimizer_states"][0]["param_groups"][0], checkpoint["lr_schedulers"]] == saved


@pytest.mark.parametrize(
    ("option", "value"), [("betas", (0.5, 0.9)), ("eps", 1e-4), ("weight_decay", 0.1), ("fused", True)]
)
def test_every_number_of_the_optimiser_takes_effect(option: str, value: Any) -> None:
    checkpoint = trained(configured(Adam), 2)
    (change,) = configure_optimizers(checkpoint, configured(Adam, **{option: value}))
    assert change.startswith(f"{option}={value} instead of")
    assert checkpoint["optimizer_states"][0]["param_groups"][0][option] == value


def test_a_class_with_the_same_moments_takes_effect() -> None:
    checkpoint = trained(configured(Adam), 2)
    configure_optimizers(checkpoint, configured(AdamW))
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["decoupled_weight_decay"]


@pytest.mark.parametrize(
    "after", [configured(SGD), configured(SGD, momentum=0.9), configured(Adam, amsgrad=True)], ids=repr
)
def test_a_class_with_other_moments_is_refused(after: Any) -> None:
    with pytest.raises(ValueError, match="the checkpoint has the optimiser state exp_avg, exp_avg_sq, step, but"):
        configure_optimizers(trained(configured(Adam), 2), after)


def test_two_optimisers_have_their_own_options() -> None:
    checkpoint = trained(configured(Adam, lr=1e-3), 2)
    checkpoint["optimizer_states"] += trained(configured(Adam, lr=1e-2), 2)["optimizer_states"]
    configure_optimizers(checkpoint, [configured(Adam, lr=1e-3), configured(Adam, lr=1e-4)])
    assert [state["param_groups"][0]["lr"] for state in checkpoint["optimizer_states"]] == [1e-3, 1e-4]


# The whole command


@pytest.fixture(scope="module")
def run(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of ten steps that kept its two best checkpoints."""
    stop = "--trainer.callbacks+=EarlyStopping"
    options = [stop, "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.patience=9"]
    return fit(tmp_path_factory.mktemp("resumed"), *SDDPM, "--checkpoint.save_top_k=2", *options)


def resume(run: Path, folder: Path, *options: str) -> Path:
    shutil.copytree(run, folder / run.name)
    resume_again(folder, *options)
    return newest_run(folder)


def resume_again(folder: Path, *options: str) -> None:
    main(["fit", "--ckpt_path=last", f"--trainer.default_root_dir={folder}", *options])


def config_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return content


def optimizer_of(run: Path) -> dict[str, Any]:
    group: dict[str, Any] = load_checkpoint(find_checkpoint(run))["optimizer_states"][0]["param_groups"][0]
    return group


def test_several_resumes_each_with_the_options_of_its_config(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = resume(run, tmp_path, "--model.optimizer.lr=1e-5", "--trainer.max_epochs=3")
    assert "initial_lr=1e-05 instead of 0.003" in capsys.readouterr().out
    assert (
        optimizer_of(resumed)["initial_lr"] == config_of(resumed)["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    )
    assert optimizer_of(resumed)["lr"] == pytest.approx(1e-5 * (1 + math.cos(math.pi * 15 / 800)) / 2, rel=1e-9)
    former = yaml.safe_load((resumed / "config-until-step-10.yaml").read_text())
    assert former["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.003

    resume_again(tmp_path, "--trainer.max_epochs=4")  # keeps what was typed before
    assert optimizer_of(resumed)["initial_lr"] == 1e-5
    config = tmp_path / "again.yaml"  # a config with another value
    changed = config_of(resumed)
    changed["model"]["init_args"]["optimizer"]["init_args"] |= {"lr": 2e-4, "weight_decay": 0.5}
    config.write_text(yaml.safe_dump(changed))
    resume_again(tmp_path, f"--config={config}", "--trainer.max_epochs=5")
    group = optimizer_of(resumed)
    assert (group["initial_lr"], group["weight_decay"]) == (2e-4, 0.5)
    assert config_of(resumed)["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.5
    assert config_of(resumed)["ckpt_path"] is None
    assert sorted(path.name for path in resumed.glob("config-*")) == [
        f"config-until-step-{step}.yaml" for step in (10, 15, 20)
    ]


def test_options_of_callbacks_win_over_their_state(run: Path, tmp_path: Path) -> None:
    (stop,) = [key for key in load_checkpoint(find_checkpoint(run))["callbacks"] if key.startswith("EarlyStopping")]
    best = find_checkpoint(run, "best").name
    resumed = resume(
        run, tmp_path, "--trainer.max_epochs=3", "--trainer.callbacks.patience=5", "--checkpoint.save_top_k=1"
    )
    callbacks = load_checkpoint(find_checkpoint(resumed))["callbacks"]
    assert callbacks[stop]["patience"] == 5
    (kept,) = next(state["best_k_models"] for key, state in callbacks.items() if key.startswith("BestCheckpoint"))
    assert Path(kept).parent == resumed / "checkpoints"  # the run was moved
    assert (resumed / "checkpoints" / best).is_file() or Path(kept).name != best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.optimizer=torch.optim.SGD"],
            "resume with the optimiser of the run's config.yaml, or start a new run",
        ),
        (["--trainer.max_steps=5"], "--trainer.max_steps=5, but the checkpoint is at step 10"),
        (["--trainer.max_epochs=1"], "--trainer.max_epochs=1, but the checkpoint is at step 10, epoch"),
        (["--seed_everything=7"], "--seed_everything=7, but the training was begun with 42"),
        (["--model.base_channels=8"], "does not fit the configured network"),
    ],
)
def test_options_that_the_state_does_not_permit_are_refused(
    options: list[str], message: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, CheckpointMismatchError), match=message):
        resume(run, tmp_path, *options)
    (copy,) = tmp_path.iterdir()
    assert (copy / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


def test_a_finished_training_says_that_nothing_is_left(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume(run, tmp_path)
    assert "nothing to train: the checkpoint is at step 10" in capsys.readouterr().out


def test_cpu_time_adds_up_over_resumed_processes(run: Path, tmp_path: Path) -> None:
    before = load_checkpoint(find_checkpoint(run))
    assert CPUTime.read(before) > 0
    assert CPUTime.read({"state_dict": {}}) == 0
    resumed = resume(run, tmp_path)  # nothing is left to train
    path = find_checkpoint(resumed)
    before["callbacks"]["CPUTime"]["seconds"] = 1e6
    save_checkpoint(before, path)
    resume_again(tmp_path, "--trainer.max_epochs=3")
    assert 1e6 < CPUTime.read(load_checkpoint(find_checkpoint(resumed))) < 1e6 + 600


def test_averaging_cannot_be_omitted(uncompiled: None, tmp_path: Path) -> None:
    averaging = "--trainer.callbacks+=EMAWeightAveraging"
    fit(tmp_path, *SDDPM, "--trainer.max_epochs=1", averaging, "--trainer.callbacks.decay=0.5")
    with pytest.raises(ValueError, match="averaged weights, which cannot be omitted"):
        resume_again(tmp_path, "--trainer.callbacks=null", "--trainer.max_epochs=2")
