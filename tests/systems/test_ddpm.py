from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from formula import Formula
from torch import Tensor

from systems import DDPM
from systems.checkpoints import CheckpointMismatchError, load_checkpoint, save_checkpoint, save_safetensors
from systems.ddpm import read_official
from systems.diffusion.chains import double_tables

Reference = Callable[[str], dict[str, Tensor]]


def small(**arguments: Any) -> DDPM:
    torch.manual_seed(0)
    defaults = dict(in_channels=1, base_channels=32, channel_mult=(1,), num_res_blocks=1, num_inference_steps=3)
    return DDPM(**(defaults | arguments)).eval()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_checkpoint_is_read(prefix: str, reference: Reference) -> None:
    recorded = reference("ann_snn_small.safetensors")
    official = {k.replace("state.", prefix): v for k, v in recorded.items() if k.startswith("state.")}
    state, size = read_official(official)
    assert size == {"in_channels": 3, "base_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
    system = DDPM(**size).eval()
    system.network.load_state_dict(state)
    with torch.no_grad():
        output = system.network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded["output.ann"], rtol=0, atol=1e-5)


def test_duplicate_tensor_names_are_refused() -> None:
    state = small().network.state_dict()
    state["module.head.bias"] = state["head.bias"]
    with pytest.raises(CheckpointMismatchError, match=r"two tensors head\.bias, one named module\.head\.bias"):
        read_official(state)


def test_official_checkpoint_of_a_plain_network_sets_the_bits() -> None:
    system = small(activation_bits=32)
    assert read_official(system.network.state_dict())[1]["activation_bits"] == 32


def test_sampler_reproduces_release(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = reference("sampler_small.safetensors")
    system = small(num_inference_steps=1000)
    system.network = Formula()  # type: ignore[assignment]
    draws, start = iter(recorded["input.noise"]), recorded["input.x_T"]
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws))
    monkeypatch.setattr("systems.diffusion.gaussian.randn_tensor", lambda *_, **__: start)
    x = system.sample(torch.arange(len(start)), tuple(start.shape[1:]))  # type: ignore[arg-type]
    torch.testing.assert_close(x, recorded["output.ddpm_unclipped.1000.fixedlarge"], rtol=0, atol=1e-5)


def test_default_sampler_does_not_clamp() -> None:
    assert not small().scheduler.config.clip_sample
    assert torch.equal(small().scheduler.alphas_cumprod, double_tables(DDPMScheduler()).alphas_cumprod)
    assert (small().num_steps, small().solver, small().nfe) == (1, "DDPM", 3)


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_a_clip_value() -> None:
    system = small(dropout=0.0)
    with torch.no_grad():
        for parameter in system.network.parameters():
            if parameter.dim() == 0:
                parameter.fill_(2.0)
    optimizer = torch.optim.Adam((p for p in system.parameters() if p.requires_grad), 1e-3)
    images = torch.rand(16, 1, 8, 8) * 2 - 1
    losses = []
    for _ in range(15):
        loss = system.loss(images, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert float(system.network.tail[1].act_alpha.detach()) != 2.0


def test_official_checkpoint_of_a_width_without_32_groups_is_refused() -> None:
    state = small(base_channels=16, norm_groups=16).network.state_dict()
    with pytest.raises(CheckpointMismatchError, match="base_channels=16, but the released group norms have 32 groups"):
        read_official(state)


@pytest.mark.parametrize(("saved", "loaded"), [(32, 16), (16, 32)])
@pytest.mark.parametrize("save", [save_checkpoint, save_safetensors])
def test_checkpoint_keeps_the_groups(save: Callable[..., None], saved: int, loaded: int, tmp_path: Path) -> None:
    system = small(norm_groups=saved)
    size = dict(in_channels=1, base_channels=32, channel_mult=[1], num_res_blocks=1, norm_groups=saved)
    system.configuration = {"model": {"class_path": "DDPM", "init_args": size}}
    path = tmp_path / ("a.safetensors" if save is save_safetensors else "a.ckpt")
    with torch.no_grad():
        for parameter in system.network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 8)
    content: dict[str, Any] = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(content)
    save(content, path)
    again = DDPM.load_from_checkpoint(path)
    assert again.network.norm_groups == saved
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 999])
    assert torch.equal(again.network(x, t), system.network(x, t))
    message = f"norm_groups={saved}, but norm_groups={loaded} is configured; give --model.norm_groups {saved}"
    with pytest.raises(CheckpointMismatchError, match=message):
        small(norm_groups=loaded).on_load_checkpoint(load_checkpoint(path))


def test_checkpoints_that_do_not_record_groups() -> None:
    """The suite's have 32, the only number when they were written; a bare state dict may have any."""
    content: dict[str, Any] = {"state_dict": small().state_dict()}
    small(norm_groups=16).on_load_checkpoint(dict(content))
    content["method"] = "ddpm"
    small().on_load_checkpoint(dict(content))
    with pytest.raises(CheckpointMismatchError, match="norm_groups=32, but norm_groups=16 is configured"):
        small(norm_groups=16).on_load_checkpoint(dict(content))


def test_checkpoint_with_other_bits_is_refused() -> None:
    checkpoint: dict[str, Any] = {"state_dict": small().state_dict()}
    small().on_save_checkpoint(checkpoint)
    small().on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointMismatchError, match="activation_bits=2, but activation_bits=3 is configured"):
        small(activation_bits=3).on_load_checkpoint(checkpoint)
