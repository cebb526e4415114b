from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from systems import ANNSNN, DDPM
from systems.ann_snn import read_official
from systems.checkpoints import CheckpointMismatchError, save_checkpoint
from systems.spiking.neurons import ConvertedNeuron

Reference = Callable[[str], dict[str, Tensor]]
SIZE = dict(in_channels=1, base_channels=32, channel_mult=(1,), num_res_blocks=1)


def rename(key: str) -> str:
    """Key of the released converted network for a key of the ANN."""
    parts = key.split(".")
    stays = any(part in key for part in ("main", "shortcut", "head"))
    return key if stays else ".".join([*parts[:-2], "block", *parts[-2:]])


@pytest.mark.parametrize(
    ("spikes", "key"),
    [
        ("signed", "output.snn_signed"),
        ("unsigned", "output.snn_unsigned"),
        ("unsigned_blocks", "output.snn_unsigned_wrappers_only"),
    ],
)
def test_official_checkpoint_is_reproduced(spikes: Any, key: str, reference: Reference) -> None:
    recorded = reference("ann_snn_small.safetensors")
    state, size = read_official({rename(k[6:]): v for k, v in recorded.items() if k.startswith("state.")})
    system = ANNSNN(**size, spikes=spikes).eval()
    system.network.load_state_dict(state)
    assert system.num_steps == 3
    with torch.no_grad():
        output = system.network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded[key], rtol=0, atol=1e-5)


def test_threshold_scales_every_neuron() -> None:
    neurons = [m for m in ANNSNN(**SIZE, threshold=0.997).network.modules() if isinstance(m, ConvertedNeuron)]
    assert len(neurons) == 2 + 5 * 3
    assert {neuron.threshold for neuron in neurons} == {0.997}


@pytest.fixture
def ann(tmp_path: Path) -> Path:
    """Checkpoint of a DDPM with random weights."""
    torch.manual_seed(0)
    system = DDPM(**SIZE)
    with torch.no_grad():
        for name, parameter in system.network.named_parameters():
            if name.endswith("act_alpha"):
                parameter.fill_(1.5)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 8)
    checkpoint: dict[str, Any] = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(checkpoint)
    save_checkpoint(checkpoint, tmp_path / "ann.ckpt")
    return tmp_path / "ann.ckpt"


def fit(system: ANNSNN, folder: Path, ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **({"max_epochs": -1} | options),
    )
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trainer.fit(system, DataLoader(images, 4), ckpt_path=ckpt_path)
    return trainer


def tuned(ann: Path, **arguments: Any) -> ANNSNN:
    optimizer = lambda parameters: torch.optim.Adam(parameters, 1e-3)  # noqa: E731
    return ANNSNN(**(SIZE | dict(init_from=str(ann), finetune_steps=2, optimizer=optimizer) | arguments))


def moved(before: dict[str, Tensor], system: ANNSNN) -> set[str]:
    return {key for key, value in system.network.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_goes_through_the_blocks_and_ends(ann: Path, tmp_path: Path) -> None:
    system = tuned(ann)
    names = system.network.block_names
    seen: list[str] = []
    block_loss = system.block_loss

    def watched(name: str, x: Tensor, t: Tensor) -> Tensor:
        seen.append(name)
        assert set(t.tolist()) <= {0, 1, 2}
        return block_loss(name, x, t)

    system.block_loss = watched  # type: ignore[method-assign]
    trainer = fit(system, tmp_path)
    assert seen == ["time_embedding", "head", *(name for name in names[2:] for _ in range(2))]
    assert trainer.global_step == system.total_steps == len(seen)
    before = {k.removeprefix("network."): v for k, v in torch.load(ann)["state_dict"].items()}
    changed = moved(before, system)
    assert not [key for key in changed if key.startswith("tail") or key.endswith(("act_alpha", "embedding.0.weight"))]
    assert {next(name for name in names if key.startswith(name)) for key in changed} == set(names)
    assert system.state_dict().keys() == torch.load(ann)["state_dict"].keys()


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_moves_one_block_at_a_time_and_resumes_there(ann: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    system = tuned(ann, dropout=0.0)
    trainer = fit(system, tmp_path, max_steps=3)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    before = copy.deepcopy(system.network.state_dict())
    resumed = tuned(ann, dropout=0.0)
    trainer = fit(resumed, tmp_path, tmp_path / "part.ckpt", max_steps=4)
    changed = moved(before, resumed)
    assert changed
    assert all(key.startswith("downblocks.0.") for key in changed)
    trainer.save_checkpoint(tmp_path / "more.ckpt")
    before = copy.deepcopy(resumed.network.state_dict())
    resumed = tuned(ann, dropout=0.0)
    fit(resumed, tmp_path, tmp_path / "more.ckpt", max_steps=5)
    assert all(key.startswith("middleblocks.0.") for key in moved(before, resumed))


def started(ann: Path, **arguments: Any) -> ANNSNN:
    """A system ready for its first iteration."""
    system = tuned(ann, **arguments)
    system.trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    system.setup("fit")
    return system


def test_block_loss_compares_the_block_outputs(ann: Path) -> None:
    system = started(ann, dropout=0.5).train()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 999])
    reference = {call.name: call for call in system._reference[0].blocks(x, t)}
    for call in system.network.blocks(x, t):
        loss = system.block_loss(call.name, x, t)
        expected = F.mse_loss(system.network.mean(call.output), reference[call.name].output)
        torch.testing.assert_close(loss, expected)
    assert not system._reference[0].training


def test_block_gradient_equals_the_ann_gradient_at_the_mean_input(ann: Path) -> None:
    system = started(ann, dropout=0.0)
    x, t, name = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 999]), "middleblocks.1"
    system.block_loss(name, x, t).backward()
    gradients = {k: p.grad for k, p in system.network.get_submodule(name).named_parameters() if p.grad is not None}
    assert {k.split(".")[-1] for k in gradients} == {"weight", "bias"}
    spiking = next(call for call in system.network.blocks(x, t) if call.name == name)
    target = next(call for call in system._reference[0].blocks(x, t) if call.name == name).output
    block = copy.deepcopy(system._reference[0].get_submodule(name)).requires_grad_(True)
    output = block(*map(system.network.mean, spiking.inputs))
    output.backward(2 * (system.network.mean(spiking.output) - target) / target.numel())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, block.get_parameter(key).grad, msg=key)


@pytest.mark.filterwarnings("ignore")
def test_diffused_inputs_reach_every_step(ann: Path, tmp_path: Path) -> None:
    system = tuned(ann, finetune_inputs="diffused", finetune_steps=8)
    steps: list[int] = []
    zero = sum(p.sum() * 0 for p in system.network.parameters() if p.requires_grad)
    system.block_loss = lambda name, x, t: steps.extend(t.tolist()) or zero.clone()  # type: ignore[method-assign, func-returns-value]
    fit(system, tmp_path, max_steps=1)
    assert max(steps) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation_bits": 32}, "plain ReLU has no levels"),
        ({"activation_bits": 9}, "give 1 to 8, or 32"),
        ({"finetune_steps": 0}, "give 1 or more"),
        ({"threshold": 0.0}, "not a firing threshold"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ANNSNN(**(SIZE | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_channels": 64}, "does not fit the configured network"),
        ({"activation_bits": 3}, "trained with activation_bits=2"),
        ({"norm_groups": 16}, "trained with norm_groups=32"),
        ({"scheduler": DDPMScheduler(beta_end=0.01)}, "beta_end=0.02 but"),
    ],
)
def test_fine_tuning_from_another_ann_is_refused(ann: Path, arguments: dict, message: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=message):
        started(ann, **arguments)


def test_fine_tuning_needs_the_ann(ann: Path) -> None:
    with pytest.raises(ValueError, match="give --model"):
        started(ann, init_from=None)
