"""The network of SDiT against recordings of the released one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from systems.networks.rate_transformer import RateNeuron, SDiTNetwork, rate_lif, sinusoids
from systems.ops.wkv import wkv
from systems.spiking.neurons import SpikingNeuron

FILE = "sdit_released_small.safetensors"
PRECISIONS = [(torch.float64, ".f64", 1e-9), (torch.float32, "", 1e-5)]
BLOCKS = ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1")


@pytest.fixture(scope="module")
def recorded(reference: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return reference(FILE)


def released(recorded: dict[str, Tensor], dtype: torch.dtype) -> SDiTNetwork:
    network = SDiTNetwork(image_size=8, embed_dim=32).to(dtype)
    network.load_state_dict({k.removeprefix("state."): v for k, v in recorded.items() if k.startswith("state.")})
    return network


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), PRECISIONS)
def test_outputs_and_gradients_are_the_recorded_ones(
    recorded: dict[str, Tensor], dtype: torch.dtype, suffix: str, tolerance: float
) -> None:
    network = released(recorded, dtype)
    x, t = recorded["input.x"].to(dtype), recorded["input.t"]
    torch.testing.assert_close(
        network.eval()(x, t, recorded["input.y"]), recorded[f"output.eval{suffix}"], rtol=0, atol=tolerance
    )
    x = x.clone().requires_grad_()
    output = network.train()(x, t, recorded["input.y_train"])
    torch.testing.assert_close(output, recorded[f"output.train{suffix}"], rtol=0, atol=tolerance)
    output.square().sum().backward()
    tolerance = 1e-8 if dtype == torch.float64 else 2e-4
    assert x.grad is not None
    assert relative(x.grad, recorded["grad.input_train.f64"]) < tolerance
    names = {key for key in recorded if key.startswith("grad.param_train.")}
    assert names == {f"grad.param_train.{name}.f64" for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, recorded[f"grad.param_train.{name}.f64"]) < tolerance, name


def test_every_recorded_intermediate_is_reproduced(recorded: dict[str, Tensor]) -> None:
    network = released(recorded, torch.float64).eval()
    found: dict[str, Tensor] = {}

    def watch(module: nn.Module, name: str, of_input: bool = False) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.setdefault(name, inputs[0] if of_input else output)

        module.register_forward_hook(hook)

    first = network.in_blocks[0]
    watch(network.t_embedder, "t_emb")
    watch(network.y_embedder, "y_emb")
    watch(network.x_embedder, "patches")
    watch(first, "tokens", of_input=True)
    watch(first.norm, "in_blocks.0.norm1")
    watch(first.att, "in_blocks.0.att_current")
    watch(first.lif1.neuron, "in_blocks.0.att_spikes")
    watch(first.lif1, "in_blocks.0.att_rate")
    watch(first.ffn, "in_blocks.0.ffn_current")
    watch(first.lif2, "in_blocks.0.ffn_rate")
    watch(first.another_MLP, "in_blocks.0.gate")
    watch(network.final_layer, "final")
    watch(network.conv, "unpatchified", of_input=True)
    for name in BLOCKS:
        watch(network.get_submodule(name), f"{name}.out")
    network(recorded["input.x"].double(), recorded["input.t"], recorded["input.y"])
    m = found["tokens"].shape[1]
    z = torch.cat([found["tokens"], first.restruction_token.expand(3, -1, -1)], 1)
    found["in_blocks.0.sum"] = z + found["in_blocks.0.att_rate"] + found["in_blocks.0.ffn_rate"]
    expected = {k.removeprefix("inter.eval."): v for k, v in recorded.items() if k.startswith("inter.eval.")}
    assert {f"{name}.f64" for name in found} == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[f"{name}.f64"], rtol=0, atol=1e-9, msg=name)
    assert found["in_blocks.0.gate"].shape[1] == m
    for name, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        frequencies = recorded[f"inter.t_freq.{name}"]
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4  # float32 angles of up to 999 radians
        torch.testing.assert_close(sinusoids(recorded["input.t"], dtype), frequencies, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_firing_rates_are_the_recorded_ones(recorded: dict[str, Tensor], mode: str) -> None:
    network = released(recorded, torch.float64).train(mode == "train")
    rates: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(
                lambda m, i, spikes, name=name: rates.update({name.removesuffix(".neuron"): spikes.mean()})
            )
    labels = recorded["input.y_train" if mode == "train" else "input.y"]
    network(recorded["input.x"].double(), recorded["input.t"], labels)
    expected = {k.removeprefix(f"rate.{mode}."): v for k, v in recorded.items() if k.startswith(f"rate.{mode}.")}
    assert rates.keys() == expected.keys()
    assert len(rates) == 10
    for name, rate in rates.items():
        torch.testing.assert_close(rate, expected[name], rtol=0, atol=1e-12, msg=name)


def test_the_scan_and_its_gradients_are_the_recorded_ones(recorded: dict[str, Tensor]) -> None:
    k, v, decay, bonus = (
        recorded[f"wkv.{name}"].double().requires_grad_() for name in ("k", "v", "time_decay", "time_first")
    )
    output = wkv(k, v, decay.exp(), bonus)
    torch.testing.assert_close(output, recorded["wkv.output.f64"], rtol=0, atol=1e-9)
    (recorded["wkv.grad_output"].double() * output).sum().backward()
    for name, tensor in {"k": k, "v": v, "time_decay": decay, "time_first": bonus}.items():
        assert tensor.grad is not None
        assert relative(tensor.grad, recorded[f"wkv.grad.{name}.f64"]) < 1e-9, name


def test_neurons_and_their_gradient_are_the_recorded_ones(recorded: dict[str, Tensor]) -> None:
    current = recorded["lif.current"].double()[None].requires_grad_()
    neuron = RateNeuron(rate_lif, 4, current.shape[-1])
    spikes: list[Tensor] = []
    neuron.neuron.register_forward_hook(lambda module, inputs, output: spikes.append(output))
    rate = neuron(current)
    rate.sum().backward()
    assert torch.equal(spikes[0][:, 0].to(recorded["lif.spikes"].dtype), recorded["lif.spikes"])
    torch.testing.assert_close(rate[0], recorded["lif.mean"])
    assert current.grad is not None
    assert relative(current.grad[0], recorded["lif.grad.f64"]) < 1e-9


def test_rates_are_a_staircase_of_four_levels() -> None:
    edges = [16 / 15, 4 / 3, 2.0]
    currents = torch.tensor([[edge + offset for edge in edges for offset in (-1e-4, 1e-4)]])
    assert RateNeuron(rate_lif, 4, 6)(currents)[0].tolist() == [0, 0.25, 0.25, 0.5, 0.5, 1]


def test_initial_values_are_the_recorded_ones(recorded: dict[str, Tensor]) -> None:
    network = SDiTNetwork(image_size=8, embed_dim=32)
    layers = {"in_blocks.0": 0, "in_blocks.1": 1, "mid_block": 2, "out_blocks.0": 0, "out_blocks.1": 1}
    for block, layer in layers.items():
        values = {k: v for k, v in recorded.items() if k.startswith(f"init.layer{layer}.")}
        assert len(values) == 7
        for key, value in values.items():
            found = network.get_parameter(f"{block}.{key.split('.', 2)[2]}")
            torch.testing.assert_close(found.detach(), value, rtol=0, atol=1e-6, msg=key)


def test_initial_values_are_those_of_the_release() -> None:
    torch.manual_seed(0)
    network = SDiTNetwork(image_size=8, embed_dim=32)
    d, m = 32, 17
    uniform = {
        "x_embedder.proj.weight": (6 / (d + 12)) ** 0.5,
        "out_blocks.0.skip_linear.weight": (6 / (3 * d)) ** 0.5,
        "mid_block.restruction_token_MLP.weight": (6 / (d + m)) ** 0.5,
        "mid_block.another_MLP.weight": (6 / (d + m)) ** 0.5,
        "conv.weight": 54**-0.5,
        "conv.bias": 54**-0.5,
        "mid_block.att.key.weight": d**-0.5,
        "mid_block.att.output.weight": d**-0.5,
        "mid_block.ffn.value.weight": (4 * d) ** -0.5,
    }
    for name, bound in uniform.items():
        size = network.get_parameter(name).abs().max()
        assert 0.6 * bound < size <= bound, name
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert 0.015 < network.get_parameter(name).std() < 0.025, name
    for name in ("pos_embed", "final_layer.linear.weight", "final_layer.linear.bias", "t_embedder.mlp.2.bias"):
        assert not network.get_parameter(name).any(), name
    assert (network.mid_block.restruction_token == 1).all()
    output = network(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2]))
    torch.testing.assert_close(output, network.conv.bias[:, None, None].expand_as(output))


@pytest.mark.parametrize(
    ("size", "parameters", "tensors"),
    [
        ({}, 11_667_259, 111),
        ({"embed_dim": 512, "depth": 8}, 36_052_047, 191),
        ({"image_size": 8, "embed_dim": 32}, 91_959, 111),
    ],
)
def test_sizes_are_the_released_ones(size: dict[str, int], parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        network = SDiTNetwork(**size)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    assert not list(network.buffers())


@pytest.mark.parametrize(
    "ablation",
    [{"reconstruction": False}, {"attention": "softmax", "num_heads": 2}, {"embedding": "spiking"}, {"num_classes": 0}],
)
def test_ablations_predict_and_train_every_parameter(ablation: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = SDiTNetwork(image_size=8, embed_dim=8, **ablation)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    y = None if "num_classes" in ablation else torch.tensor([0, 10])
    output = network(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), y)
    assert output.shape == (2, 6, 8, 8)
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_image_tokens_do_not_read_reconstruction_tokens() -> None:
    """Before the gate: the mixers are causal and the learned tokens come last."""
    torch.manual_seed(0)
    network = SDiTNetwork(image_size=8, embed_dim=8).eval()
    block = network.in_blocks[0]
    gates: list[Tensor] = []
    block.another_MLP.register_forward_hook(lambda module, inputs, output: gates.append(output))
    x = torch.randn(1, 17, 8)
    first = block(x) / (1 + gates[0])
    nn.init.normal_(block.restruction_token)
    second = block(x) / (1 + gates[1])
    assert not torch.allclose(gates[0], gates[1])
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_classes_that_do_not_fit_the_network_have_one_message() -> None:
    images, t = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="has 10 classes but received none"):
        SDiTNetwork(image_size=8, embed_dim=8)(images, t)
    with pytest.raises(ValueError, match="the network is unconditional; give classes"):
        SDiTNetwork(image_size=8, embed_dim=8, num_classes=0)(images, t, t)
    with pytest.raises(ValueError, match=r"images have shape \(1, 1, 8, 8\)"):
        SDiTNetwork(image_size=8, embed_dim=8)(images[:, :1], t, t)
