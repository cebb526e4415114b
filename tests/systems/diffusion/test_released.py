from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from diffusers import DDPMScheduler
from tiny import SDDPM, fit

import systems

SCHEDULERS = ("AnalyticDPMScheduler", "DPMSolverScheduler", "StridedDDIMScheduler", "StridedDDPMScheduler")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_schedule_and_its_config(name: str) -> None:
    scheduler = getattr(systems, name)(num_train_timesteps=50, beta_end=0.01, prediction_type="sample")
    expected = DDPMScheduler(50, beta_end=0.01, prediction_type="sample")
    assert (scheduler.alphas_cumprod == expected.alphas_cumprod).all()
    assert "kwargs" not in scheduler.config
    assert {key: scheduler.config[key] for key in ("num_train_timesteps", "beta_start", "beta_end")} == {
        "num_train_timesteps": 50,
        "beta_start": 0.0001,
        "beta_end": 0.01,
    }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_is_rebuilt_from_its_config(name: str) -> None:
    scheduler = getattr(systems, name)(num_train_timesteps=50, beta_end=0.01, prediction_type="sample")
    rebuilt = type(scheduler).from_config(scheduler.config)
    values = [{k: v for k, v in s.config.items() if not k.startswith("_")} for s in (scheduler, rebuilt)]
    assert values[0] == values[1]
    assert type(scheduler).from_config(scheduler.config, beta_end=0.03).config.beta_end == 0.03


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_options_of_ddpm_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="thresholding"):
        getattr(systems, name)(thresholding=True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_run_config_names_the_exported_class(name: str, tmp_path: Path, uncompiled: None) -> None:
    """The name survives a move of the module, so that runs can be read after one."""
    options = [f"--model.scheduler={name}", "--model.scheduler.beta_end=0.01", "--trainer.limit_train_batches=1"]
    run = fit(tmp_path, *SDDPM, *options, "--trainer.max_epochs=1", "--trainer.limit_val_batches=0")
    scheduler = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["scheduler"]
    assert scheduler["class_path"] == f"systems.{name}"
    assert scheduler["init_args"]["beta_end"] == 0.01
    assert "thresholding" not in scheduler["init_args"]
