from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fsddim_reference import PREFIXES, recorded_system, state_of, tiny
from torch import Tensor

from systems import FSDDIM
from systems.checkpoints import CheckpointMismatchError
from systems.fsddim import cosine_schedule, ddim_coefficients, decode, encode, read_official
from systems.spiking.neurons import SpikingNeuron

Reference = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("fsddim_small.safetensors")


@pytest.mark.parametrize("steps", [10, 1000])
def test_reproduces_schedule_and_reconstruction_factor(recorded: dict[str, Tensor], steps: int) -> None:
    system = tiny(num_train_timesteps=steps)
    expected = recorded[f"schedule.{steps}.alphas_cumprod"]
    torch.testing.assert_close(system.alphas_cumprod.float(), expected, rtol=1e-5, atol=1e-7)
    factor = system.get_buffer("reconstruction_factor")
    torch.testing.assert_close(factor, recorded[f"schedule.{steps}.recons_weight"], rtol=1e-5, atol=1e-6)
    raw = tiny(num_train_timesteps=steps, normalise_reconstruction=False).get_buffer("reconstruction_factor")
    torch.testing.assert_close(raw / raw[0], factor)
    if steps == 1000:
        assert float(raw[0]) == pytest.approx(0.006425, abs=1e-6)
        assert float(factor.mean()) == pytest.approx(0.2445, abs=1e-4)


@pytest.mark.parametrize("norm", PREFIXES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_reproduces_loss_terms(recorded: dict[str, Tensor], norm: str, mode: str) -> None:
    system = recorded_system(recorded, norm).train(mode == "train")
    images = recorded["loss.input.image01"] * 2 - 1
    terms = system.loss_terms_at(images, recorded["loss.input.noise"], recorded["loss.input.t"])
    for ours, theirs in (("image", "image"), ("spike", "spike"), ("reconstruction", "recons")):
        expected = recorded[f"{PREFIXES[norm]}loss.{theirs}.{mode}"]
        torch.testing.assert_close(terms[ours], expected, rtol=0, atol=1e-6, msg=ours)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("suffix", ["", ".f64"])
def test_reproduces_chain_in_currents(recorded: dict[str, Tensor], suffix: str, fused: bool) -> None:
    dtype = torch.float64 if suffix else torch.float32
    system = recorded_system(recorded, "tdbn", num_steps_of_chain=10, fused=fused).to(dtype)
    with torch.no_grad():
        states = list(system.denoise(encode(recorded["sample.x_init"].to(dtype), 4)))
    assert len(states) == 11
    for ours, expected in zip(states[1:], recorded[f"sample.steps{suffix}"], strict=True):
        torch.testing.assert_close(ours.movedim(0, -1), expected, rtol=0, atol=1e-5)
    image = decode(states[-1]).clamp(-1, 1)
    torch.testing.assert_close(image, recorded[f"sample.x0{suffix}"], rtol=0, atol=1e-5)
    torch.testing.assert_close((image.float() + 1) / 2, recorded["sample.image01"], rtol=0, atol=1e-5)


def test_ddim_coefficients_match_the_clean_image_form() -> None:
    power = cosine_schedule(1000).flip(0)
    previous = torch.cat([power[1:], power.new_ones(1)])
    p, q = ddim_coefficients(power, previous)
    c2 = ((1 - previous) / (1 - power)).sqrt()
    c1 = previous.sqrt() - power.sqrt() * c2
    torch.testing.assert_close(p, c1 * power.sqrt() + c2, rtol=0, atol=1e-12)
    torch.testing.assert_close(q, -c1 * (1 - power).sqrt(), rtol=0, atol=1e-12)


def test_perfect_prediction_is_denoised_exactly_in_any_number_of_steps() -> None:
    image, noise = torch.rand(2, 1, 8, 8).double() * 2 - 1, torch.randn(2, 1, 8, 8).double()
    for steps in (1, 3, 1000):
        system = tiny(num_inference_steps=steps).double()

        def oracle(x: Tensor, t: Tensor, power: Tensor = system.alphas_cumprod) -> Tensor:
            return power[t[0]].sqrt() * encode(noise, 3) - (1 - power[t[0]]).sqrt() * encode(image, 3)

        system.network.forward = oracle
        start = system.alphas_cumprod[-1]
        noisy = start.sqrt() * image + (1 - start).sqrt() * noise
        *_, x = system.denoise(encode(noisy, 3))
        torch.testing.assert_close(decode(x), image, rtol=0, atol=1e-10)


def test_timesteps_are_spaced_from_the_noisy_end() -> None:
    assert tiny(num_inference_steps=4)._timesteps().tolist() == [999, 749, 499, 249]
    assert tiny(num_inference_steps=1000)._timesteps().tolist() == list(range(999, -1, -1))
    assert (tiny(num_inference_steps=4).nfe, tiny().solver) == (4, "DDIM in currents")


def test_encoding_and_decoding_invert() -> None:
    image = torch.randn(2, 3, 4, 4)
    assert encode(image, 5).shape == (5, 2, 3, 4, 4)
    torch.testing.assert_close(decode(encode(image, 5)), image)


@pytest.mark.parametrize("fused", [False, True])
def test_image_depends_only_on_its_seed(fused: bool) -> None:
    system = tiny(fused=fused).double()
    seeds = torch.arange(5)
    together = system.sample(seeds, (1, 8, 8))
    apart = torch.cat([system.sample(seeds[:2], (1, 8, 8)), system.sample(seeds[2:], (1, 8, 8))])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)
    assert not torch.equal(together[0], together[1])


@torch.no_grad()
def test_trajectory_starts_from_noise_and_ends_clamped() -> None:
    system = tiny()
    states = list(system.trajectory(torch.arange(64), (1, 8, 8)))
    assert len(states) == 5
    assert abs(float(states[0].std()) - 1) < 0.05
    assert torch.equal(states[-1], system.sample(torch.arange(64), (1, 8, 8)))
    currents = list(system.currents(torch.arange(64), (1, 8, 8)))
    assert torch.equal(states[-1], decode(currents[-1]).clamp(-1, 1))
    assert torch.equal(currents[0][0], currents[0][2])
    assert not torch.equal(currents[1][0], currents[1][2])
    assert decode(currents[-1]).abs().max() > 1


@torch.no_grad()
def test_loss_is_the_weighted_sum_and_repeatable() -> None:
    images = torch.rand(4, 1, 8, 8) * 2 - 1

    def loss(**weights: float) -> float:
        return float(tiny(**weights).loss(images, torch.Generator().manual_seed(3)))

    terms = {k: float(v) for k, v in tiny().loss_terms(images, torch.Generator().manual_seed(3)).items()}
    assert loss() == pytest.approx(terms["image"] + terms["reconstruction"])
    assert loss(image_weight=0, spike_weight=2, reconstruction_weight=0.5) == pytest.approx(
        2 * terms["spike"] + terms["reconstruction"] / 2
    )


def test_threshold_reaches_every_neuron() -> None:
    neurons = [m for m in tiny(threshold=0.997).network.modules() if isinstance(m, SpikingNeuron)]
    assert {n.threshold for n in neurons} == {0.997}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0; give 1 or more"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"image_weight": 0, "reconstruction_weight": 0}, "image_weight=0.* one of them above 0"),
        ({"spike_weight": -1}, "spike_weight=-1; give weights of 0 or more"),
        ({"spike_grad": "step"}, "spike_grad='step' is not a surrogate"),
    ],
)
def test_invalid_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def official(system: FSDDIM) -> dict[str, Tensor]:
    """The tensors of a network in the layout of the released code."""
    state = system.network.state_dict()
    return {
        key.replace("bn_in.", "conv_in.bn."): value.unsqueeze(-1) if value.dim() == 4 else value
        for key, value in state.items()
    }


@pytest.mark.parametrize("activate", [False, True])
def test_official_checkpoint_yields_tensors_and_options(activate: bool) -> None:
    sizes = dict(in_channels=3, base_channels=4, channel_mult=[1, 2, 3], num_res_blocks=1)
    sizes |= {"num_train_timesteps": 20, "max_time": 20}
    sizes["activate_first_conv"] = activate
    system = tiny(**sizes, num_inference_steps=2)
    tensors, options = read_official(official(system))
    assert options == sizes
    assert all(torch.equal(tensors[name], tensor) for name, tensor in system.network.state_dict().items())


def test_other_checkpoints_are_refused(recorded: dict[str, Tensor]) -> None:
    state = state_of(recorded)
    for lacking in ("conv_in.weight", "downs.0.0.conv1.weight", "downs.1.2.weight", "pe"):
        with pytest.raises(KeyError, match=lacking.split(".")[-1]):
            read_official({key: value for key, value in state.items() if key != lacking})
    state["attention.weight"] = state.pop("conv_out.bias")
    with pytest.raises(CheckpointMismatchError, match=r"1 missing: conv_out\.bias; 1 unknown: attention\.weight"):
        read_official(state)


def test_the_noise_schedule_of_training_is_kept() -> None:
    options: dict[str, Any] = dict(in_channels=1, base_channels=8, channel_mult=(1,), num_res_blocks=1, num_steps=1)
    system = FSDDIM(**options, num_inference_steps=2)
    checkpoint: dict[str, Any] = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(checkpoint)
    FSDDIM(**options, num_inference_steps=5).on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointMismatchError, match="num_train_timesteps=1000 instead of 500"):
        FSDDIM(**options, num_inference_steps=2, num_train_timesteps=500).on_load_checkpoint(checkpoint)
