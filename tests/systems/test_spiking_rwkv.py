from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from systems.spiking.neurons import SpikingNeuron
from systems.spiking_rwkv import SpikingRWKV

SIZES = {"image_size": 8, "embed_dim": 16, "depth": 3, "num_steps": 2, "num_inference_steps": 4}


def system(**arguments: object) -> SpikingRWKV:
    torch.manual_seed(0)
    return SpikingRWKV(**(SIZES | arguments))


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler(), DPMSolverMultistepScheduler()])
def test_samples_depend_only_on_their_seed(scheduler: object) -> None:
    rwkv = system(scheduler=scheduler).eval()
    images = rwkv.sample(torch.arange(3), (1, 8, 8))
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    torch.testing.assert_close(rwkv.sample(torch.tensor([2]), (1, 8, 8))[0], images[2], rtol=1e-3, atol=1e-3)


def test_defaults_suit_28x28_images() -> None:
    with torch.device("meta"):
        rwkv = SpikingRWKV()
    assert (rwkv.num_steps, rwkv.network.patch_size, len(rwkv.network.in_blocks)) == (4, 2, 4)
    assert rwkv.network.position.shape == (14 * 14, 384)
    neurons = [m for m in rwkv.modules() if isinstance(m, SpikingNeuron)]
    assert {(n.beta, n.threshold, n.reset_mechanism, n.input_scale) for n in neurons} == {(0.5, 1.0, "zero", 1.0)}
    assert len({n.spike_grad for n in neurons}) == 1  # compiled only once
    optimizer, schedule = rwkv.configure_optimizers().values()
    assert (schedule["scheduler"].start_factor, schedule["scheduler"].total_iters) == (1 / 2500, 2500)
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == (
        2e-4,
        (0.99, 0.999),
        0.03,
    )


def test_neuron_options_reach_every_neuron_and_the_module() -> None:
    rwkv = system(beta=0.9, threshold=0.7, reset_mechanism="subtract", spike_grad="triangle")
    neurons = [m for m in rwkv.modules() if isinstance(m, SpikingNeuron)]
    assert {(n.beta, n.threshold, n.reset_mechanism) for n in neurons} == {(0.9, 0.7, "subtract")}
    assert rwkv.network.reconstruction.beta == 0.9


@pytest.mark.slow
def test_a_few_steps_lower_the_loss() -> None:
    rwkv = system()
    optimizer = torch.optim.AdamW(rwkv.parameters(), 3e-3)
    images = torch.ones(8, 1, 8, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    losses = []
    for step in range(30):
        loss = rwkv.loss(images, torch.Generator().manual_seed(step % 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    gate = rwkv.network.reconstruction.gate
    assert gate.abs().sum() > 0  # initialised to zero
