from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from systems.networks.ann_unet import ANNUNet
from systems.ops.quantise import QReLU, quantised_relu
from systems.spiking.neurons import ConvertedNeuron

Reference = Callable[[str], dict[str, Tensor]]
SMALL = dict(in_channels=3, base_channels=32, channel_mult=(1, 2), num_res_blocks=1)


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("ann_snn_small.safetensors")


def load(recorded: dict[str, Tensor], **arguments: object) -> ANNUNet:
    network = ANNUNet(**(SMALL | arguments)).eval()
    network.load_state_dict({k.removeprefix("state."): v for k, v in recorded.items() if k.startswith("state.")})
    return network


def signs(network: ANNUNet, spikes: str) -> None:
    for name, module in network.named_modules():
        if isinstance(module, ConvertedNeuron):
            module.signed = spikes == "signed" or (spikes == "helper" and name.startswith(("time_embedding", "tail")))


def test_quantiser_reproduces_reference(recorded: dict[str, Tensor]) -> None:
    quantise = QReLU(2)
    with torch.no_grad():
        quantise.act_alpha.fill_(1.7)
    x = recorded["quant.x"].clone().requires_grad_()
    y = quantise(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, recorded["quant.y"], rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad, recorded["quant.grad_x"], rtol=0, atol=1e-6)
    torch.testing.assert_close(quantise.act_alpha.grad, recorded["quant.grad_alpha"], rtol=0, atol=1e-5)


def test_quantiser_rounds_half_to_even() -> None:
    quantise = QReLU(2)
    with torch.no_grad():
        quantise.act_alpha.fill_(3.0)
    y = quantise(torch.tensor([-1.0, 0.5, 1.5, 2.5, 2.6, 9.0]))
    assert y.tolist() == [0, 0, 2, 2, 3, 3]


def test_ann_reproduces_released_network(recorded: dict[str, Tensor]) -> None:
    network = load(recorded, activation=partial(QReLU, 2))
    temb = network.time_embedding(recorded["input.t"])
    torch.testing.assert_close(temb, recorded["inter.ann.temb"], rtol=0, atol=1e-6)
    output = network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded["output.ann"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spikes", "key"),
    [
        ("signed", "output.snn_signed"),
        ("unsigned", "output.snn_unsigned"),
        ("helper", "output.snn_unsigned_wrappers_only"),
    ],
)
def test_conversion_reproduces_released_network(recorded: dict[str, Tensor], spikes: str, key: str) -> None:
    network = load(recorded, activation=ConvertedNeuron, num_steps=3)
    signs(network, spikes)
    rates: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, ConvertedNeuron):
            module.register_forward_hook(lambda m, i, out, name=name: rates.update({name: (out != 0).float().mean()}))
    output = network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded[key], rtol=0, atol=1e-5)
    expected = {k.removeprefix(f"rate.{spikes}."): v for k, v in recorded.items() if k.startswith(f"rate.{spikes}.")}
    assert rates.keys() == expected.keys()
    for name, rate in expected.items():
        torch.testing.assert_close(rates[name], rate, rtol=0, atol=1e-6, msg=name)


def test_converted_time_embedding_has_the_ann_mean(recorded: dict[str, Tensor]) -> None:
    network = load(recorded, activation=ConvertedNeuron, num_steps=3)
    temb = network.time_embedding(recorded["input.t"]).unflatten(0, (3, -1))  # (T, B, C)
    torch.testing.assert_close(temb.transpose(0, 1), recorded["inter.snn_unsigned.temb"], rtol=0, atol=1e-6)
    torch.testing.assert_close(temb.mean(0), recorded["inter.ann.temb"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("channel_mult", "bits", "count", "tensors"),
    [((1, 2, 2, 2), 2, 34_292_295, 337), ((1, 2, 2, 2), 32, 34_292_227, 269), ((1, 2, 2, 4), 32, 66_551_043, 271)],
)
def test_full_size_counts(channel_mult: tuple[int, ...], bits: int, count: int, tensors: int) -> None:
    with torch.device("meta"):
        network = ANNUNet(channel_mult=channel_mult, activation=partial(quantised_relu, bits))
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(network.state_dict()) == tensors


def test_blocks_are_lazy_and_named() -> None:
    torch.manual_seed(0)
    network = ANNUNet(**SMALL).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    calls = list(network.blocks(x, t))
    assert [call.name for call in calls] == network.block_names
    for call in calls:
        assert torch.equal(network.get_submodule(call.name)(*call.inputs), call.output)
    network.upblocks[0].register_forward_hook(lambda *_: pytest.fail("ran past the last block asked for"))
    assert next(call for call in network.blocks(x, t) if call.name == "middleblocks.1").output.shape == (2, 64, 4, 4)


def test_dropout_acts_only_in_training() -> None:
    torch.manual_seed(0)
    network = ANNUNet(**(SMALL | {"dropout": 0.5}))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 998.5])  # real-valued steps, as used by DPM-Solver
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


def test_untrained_network_predicts_almost_nothing() -> None:
    output = ANNUNet(**SMALL)(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]))
    assert output.abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_channels": 24}, "norm_groups=32 with base_channels=24: .* give --model.norm_groups 8 or another"),
        ({"norm_groups": 0}, "norm_groups=0 with base_channels=32: .* give --model.norm_groups 32"),
        ({"norm_groups": 5}, "norm_groups=5 with base_channels=32"),
        ({"base_channels": 7, "norm_groups": 7}, "base_channels must be a multiple of 2"),
        ({"channel_mult": ()}, "channel_mult not empty"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ANNUNet(**(SMALL | arguments))


@pytest.mark.parametrize(("arguments", "groups"), [({}, 32), ({"base_channels": 16, "norm_groups": 8}, 8)])
def test_all_group_norms_have_the_configured_groups(arguments: dict, groups: int) -> None:
    network = ANNUNet(**(SMALL | {"channel_mult": (1, 3)} | arguments))
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 2 * 8 + 1  # 2 blocks down, 2 in the middle, 4 up; the tail
    assert {norm.num_groups for norm in norms} == {groups}
    assert network(torch.randn(2, 3, 8, 8), torch.tensor([0, 999])).shape == (2, 3, 8, 8)


def test_groups_are_normalised_separately() -> None:
    """One channel more or less in a group changes its mean, so that the outputs of equal weights differ."""
    networks = [ANNUNet(**(SMALL | {"norm_groups": groups})) for groups in (32, 16)]
    for parameter in networks[0].parameters():
        nn.init.normal_(parameter, std=0.1)
    networks[1].load_state_dict(networks[0].state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 999])
    first, second = (network.eval()(x, t) for network in networks)
    assert (first - second).abs().max() > 0.01


def test_bad_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="give 1 to 8, or 32"):
        quantised_relu(9)


def test_a_negative_clip_value_outputs_zero() -> None:
    """`s` is learned and free; the formula clamps `relu(x) / s`."""
    quantise = quantised_relu(2)
    with torch.no_grad():
        quantise.act_alpha.fill_(-1.7)
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0], requires_grad=True)
    y = quantise(x)
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()
    assert quantise.act_alpha.grad == 0


def test_images_of_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        ANNUNet(**SMALL)(torch.zeros(2, 3, 9, 8), torch.zeros(2, dtype=torch.long))
