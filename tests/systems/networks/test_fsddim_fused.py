from __future__ import annotations

import warnings

import pytest
import torch
from fsddim_reference import tiny
from torch import Tensor

from leaderboard.evaluation.cost import CostMeter
from leaderboard.record.records import Cost
from systems import FSDDIM
from systems.checkpoints import check_state
from systems.fsddim import decode

pytestmark = pytest.mark.slow

SHAPE = (1, 8, 8)


def pair(**options: object) -> tuple[FSDDIM, FSDDIM]:
    plain, fused = tiny(**options), tiny(fused=True, **options)
    check_state(plain.state_dict(), fused, "the plain system")  # both accept the same checkpoints
    fused.load_state_dict(plain.state_dict())
    torch.nn.init.constant_(plain.network.conv_out.bias, 0.7)  # large, so that the border map matters
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("norm", ["plain", "tdbn"])
def test_same_currents_as_the_plain_sampler(activate: bool, norm: str) -> None:
    plain, fused = pair(activate_first_conv=activate, norm=norm, num_inference_steps=20)
    with torch.no_grad():
        for a, b in zip(*(s.double().currents(torch.arange(3), SHAPE) for s in (plain, fused)), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-9)


@pytest.mark.parametrize("activate", [False, True])
def test_same_images_in_single_precision_over_50_steps(activate: bool) -> None:
    """Small enough that no potential lies within rounding of its threshold, which would flip a spike."""
    plain, fused = pair(activate_first_conv=activate, num_inference_steps=50)
    with torch.no_grad():
        (*_, a), (*_, b) = (s.currents(torch.arange(2), SHAPE) for s in (plain, fused))
    torch.testing.assert_close(decode(b), decode(a), rtol=0, atol=1e-3)
    assert not torch.equal(b, a)


def test_a_constant_bias_would_be_wrong_at_the_border() -> None:
    _, fused = pair()
    assert fused.recurrence is not None
    fused.recurrence.merge(fused.network, SHAPE[1:])
    border = fused.recurrence.border  # (K, H, W)
    assert torch.allclose(border[:, 1:-1, 1:-1], border[:, 1:2, 1:2].expand(-1, 6, 6))
    assert not torch.allclose(border[:, 0], border[:, 1])


def test_current_weights_are_merged() -> None:
    plain, fused = pair()
    before = fused.sample(torch.arange(2), SHAPE)
    for system in (plain, fused):
        with torch.no_grad():
            system.network.conv_in.weight.mul_(2)
    after = fused.sample(torch.arange(2), SHAPE)
    assert (before - after).abs().mean() > 1e-3
    torch.testing.assert_close(after, plain.sample(torch.arange(2), SHAPE), rtol=0, atol=1e-4)


def cost(system: FSDDIM) -> Cost:
    with CostMeter(system.network) as meter:
        system.sample(torch.arange(2), SHAPE)
    return meter.take().cost(system.network, 2, system.nfe)


@pytest.mark.parametrize("activate", [False, True])
def test_cost_counts_the_real_valued_part_as_macs(activate: bool) -> None:
    plain, fused = (cost(s) for s in pair(activate_first_conv=activate))
    assert fused.parameters == plain.parameters
    assert fused.firing_rate == pytest.approx(plain.firing_rate)
    points, num_steps, nfe, base = 8 * 8, 3, 4, 8
    conv_in = num_steps * points * 9 * base
    real_current = 0 if activate else num_steps * points * 9 * base * base  # the current to itself
    assert plain.macs - fused.macs == pytest.approx(nfe * conv_in - conv_in - nfe * real_current)
    spikes = transmitted_spikes(pair(activate_first_conv=activate)[0])
    assert fused.sops - plain.sops == pytest.approx(nfe * 9 * base * spikes, rel=1e-6)


def transmitted_spikes(system: FSDDIM) -> float:
    """Spikes that enter `conv_out`, per image and network evaluation."""
    totals: list[float] = []

    def hook(module: object, parts: tuple[Tensor, ...], out: Tensor) -> None:
        totals.append(sum(float(part.sum()) for part in parts if ((part == 0) | (part == 1)).all()) / 2)

    system.network.conv_out.register_forward_hook(hook)
    system.sample(torch.arange(2), SHAPE)
    return sum(totals) / len(totals)


def test_warns_of_real_valued_channels() -> None:
    with pytest.warns(UserWarning, match="32 channels, 8 of them the real-valued current of conv_in, counted as MACs"):
        FSDDIM(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system = FSDDIM(base_channels=8, channel_mult=(1, 2), num_res_blocks=1, fused=True, activate_first_conv=True)
    assert system.recurrence is not None
    assert system.recurrence.transmitted == "the fused sampler transmits 32 channels, all of them spikes"
    assert system.solver == "DDIM in currents, fused"


def test_anything_but_spikes_is_refused() -> None:
    _, fused = pair(activate_first_conv=True)
    features = fused.network.features
    fused.network.features = lambda current, t: [0.5 * part for part in features(current, t)]
    with pytest.raises(RuntimeError, match="other values than 0 and 1 as spikes"):
        fused.sample(torch.arange(2), SHAPE)


@torch.no_grad()
def test_rounding_stays_small_over_50_steps_of_the_same_spikes() -> None:
    """Excludes spikes flipped by rounding: both samplers receive the features transmitted by one of them."""
    plain, fused = pair(num_inference_steps=50)
    recorded: list[list[Tensor]] = []
    features = plain.network.features

    def record(current: Tensor, t: Tensor) -> list[Tensor]:
        recorded.append(features(current, t))
        return recorded[-1]

    plain.network.features = record
    *_, expected = plain.currents(torch.arange(2), SHAPE)
    replay = iter(recorded)
    fused.network.features = lambda current, t: next(replay)
    *_, x = fused.currents(torch.arange(2), SHAPE)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
