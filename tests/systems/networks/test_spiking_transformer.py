from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from systems.networks.spiking_transformer import Block, Reconstruction, ShiftedLinear, SpikingTransformer
from systems.spiking.neurons import SpikingNeuron

VARIANTS = [
    {},
    {"reconstruction": False},
    {"attention": "softmax", "num_heads": 2},
    {"embedding": "spiking"},
    {"scan": "bidirectional"},
    {"inner_norm": True},
]


def small(**arguments: object) -> SpikingTransformer:
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_steps": 3}
    return SpikingTransformer(**(sizes | arguments))


def firing(**arguments: object) -> SpikingTransformer:
    """A network in which neurons after the mixers fire, as they rarely do untrained."""
    network = small(**arguments)
    for block in network.modules():
        if isinstance(block, Block):
            block.spatial_v.weight.data *= 10
            block.channel_k.weight.data *= 3
    return network


def batch(size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.tensor([3, 900, 40, 500])[:size]


def weighted(network: nn.Module) -> list[nn.Module]:
    """Layers with weights inside the blocks."""
    return [m for b in network.modules() if isinstance(b, Block) for m in b.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_block_weights_receive_only_spikes(variant: dict) -> None:
    network = firing(**variant)
    seen = []
    for layer in weighted(network):
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0])))
    network(*batch())
    assert len(seen) == len(weighted(network)) == 3 * 7 + 1
    for _, x in seen:
        assert ((x == 0) | (x == 1)).all()
    assert all(x.any() for _, x in seen)


def test_inner_norm_lets_every_neuron_fire() -> None:
    def silent(network: nn.Module) -> int:
        rates = []
        for m in network.modules():
            if isinstance(m, SpikingNeuron):
                m.register_forward_hook(lambda m, a, out: rates.append(out.mean()))
        network(*batch())
        return sum(rate < 0.1 for rate in rates)

    assert silent(small(inner_norm=True)) == 0
    assert silent(small()) == 2 * 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_reach_every_parameter(variant: dict) -> None:
    network = firing(**variant)
    if network.reconstruction is not None:
        nn.init.normal_(network.reconstruction.gate, std=0.1)  # with a gate of zero the module gets no gradient
    prediction = network(*batch())
    assert prediction.shape == (2, 1, 8, 8)
    prediction.square().sum().backward()
    missing = [
        name for name, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []


def test_token_shift_is_two_spike_fed_products() -> None:
    torch.manual_seed(0)
    layer = ShiftedLinear(6, 5)
    layer.mix.data.uniform_()
    s = torch.randint(2, (2, 3, 4, 6)).float()
    here, before = layer.taps
    previous = torch.cat([torch.zeros_like(s[..., :1, :]), s[..., :-1, :]], -2)
    expected = F.linear(s, here, layer.bias) + F.linear(previous, before)
    torch.testing.assert_close(layer(s), expected)


def test_reconstruction_is_initially_the_identity() -> None:
    with_module, without = small(), small(reconstruction=False)
    state = {k: v for k, v in with_module.state_dict().items() if not k.startswith("reconstruction")}
    without.load_state_dict(state)
    assert torch.equal(with_module(*batch()), without(*batch()))


def test_reconstruction_by_hand() -> None:
    torch.manual_seed(0)
    module = Reconstruction(channels=2, depth=2, beta=0.5)
    module.token.data = torch.tensor([1.0, -1.0])
    module.drive.data = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    module.gate.data = torch.stack([3 * torch.eye(2), torch.eye(2)])
    first, second = module(num_steps=2)
    m = torch.tensor([1.0, 1.5])  # of channel 0: 1, then 0.5 * 1 + 1
    rho = 1 + m.tanh()
    torch.testing.assert_close(first[:, 0], 1 + 3 * rho)
    m2 = torch.stack([2 * rho[0], 0.5 * 2 * rho[0] + 2 * rho[1]])
    torch.testing.assert_close(second[:, 0], 1 + rho + m2.tanh())
    torch.testing.assert_close(first[:, 1] - 1, 1 - first[:, 0])  # the token is antisymmetric


def test_reconstruction_scales_the_output_of_each_block() -> None:
    network = small(depth=1).eval()
    inputs = []
    for module in (network.mid_block, network.norm):
        module.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    nn.init.normal_(network.reconstruction.gate)
    network(*batch())
    factors = network.reconstruction(3)[0]  # (T, D)
    alone = network.mid_block(inputs[0])
    torch.testing.assert_close(inputs[1], (alone * factors[:, None, None]).mean(0))


def test_long_skips_join_first_and_last_block() -> None:
    network = small(depth=5).eval()
    given = {}
    for i, block in enumerate(network.in_blocks):
        block.register_forward_hook(lambda m, a, out, i=i: given.update({f"in{i}": out}))
    for i, block in enumerate(network.out_blocks):
        block.register_forward_hook(lambda m, args, out, i=i: given.update({f"out{i}": args[1]}))
    network(*batch())
    assert torch.equal(given["out0"], given["in1"])
    assert torch.equal(given["out1"], given["in0"])


def test_spiking_embedding_makes_patches_spikes_and_keeps_the_time() -> None:
    network = small(embedding="spiking")
    tokens = network._embed(*batch())
    assert tokens.shape == (3, 2, 1 + 16, 16)
    assert ((tokens[:, :, 1:] == 0) | (tokens[:, :, 1:] == 1)).all()
    assert 0 < tokens[:, :, 1:].mean() < 1
    assert not ((tokens[:, :, 0] == 0) | (tokens[:, :, 0] == 1)).all()


def test_causal_scan_does_not_see_later_patches() -> None:
    """Before the final 3x3 convolution, which mixes neighbours."""
    x, t = batch()
    changed = x.clone()
    changed[:, :, 4:] += 1  # lower half: patches 8 to 15

    def difference(network: SpikingTransformer) -> Tensor:
        tokens = []
        network.norm.register_forward_hook(lambda m, args, out: tokens.append(args[0]))
        network.eval()
        network(x, t)
        network(changed, t)
        return (tokens[0] - tokens[1]).abs().sum((0, 2))

    causal, both = difference(firing()), difference(firing(scan="bidirectional"))
    assert (causal[:9] == 0).all()
    assert causal[9:].all()
    assert both[:9].any()
    assert difference(firing(attention="softmax", num_heads=2))[:9].any()


def test_softmax_has_nearly_the_same_parameter_count() -> None:
    count = {v: sum(p.numel() for p in small(attention=v, num_heads=2).parameters()) for v in ("rwkv", "softmax")}
    assert count["rwkv"] - count["softmax"] == 3 * 2 * 16  # decay and bonus of each block


def test_calls_are_independent_and_steps_may_be_real() -> None:
    network = firing().eval()
    x, t = batch(4)
    first = network(x, t)
    network(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    assert torch.equal(network(x, t), first)
    torch.testing.assert_close(network(x, t.float()), first, rtol=0, atol=0.05)
    assert not torch.equal(network(x, t.float() + 0.5), first)


@pytest.mark.parametrize(
    ("sizes", "parameters", "neurons"), [((1, 28, 2, 384, 9), 21_527_438, 40), ((3, 64, 4, 512, 13), 55_058_052, 58)]
)
def test_full_size_counts(sizes: tuple[int, ...], parameters: int, neurons: int) -> None:
    with torch.device("meta"):
        network = SpikingTransformer(*sizes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(isinstance(m, SpikingNeuron) for m in network.modules()) == neurons


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0; give 1 or more"),
        ({"patch_size": 3}, "image_size=8 is not a multiple of patch_size=3"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"depth": 4}, "depth=4 leaves no middle block; give an odd number, such as 5"),
        ({"depth": 0}, "such as 3"),
        ({"embed_dim": 12}, "give a multiple of 8 for embed_dim"),
        ({"mlp_ratio": 0}, "mlp_ratio above 0"),
        ({"attention": "softmax", "num_heads": 3}, "num_heads=3 does not divide embed_dim=16"),
        ({"attention": "softmax", "num_heads": 2, "scan": "bidirectional"}, "is an option of attention='rwkv'"),
    ],
)
def test_bad_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (2, 3, 8, 8), (1, 8, 8)])
def test_images_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"this network takes \(B, 1, 8, 8\): set --model.in_channels"):
        small()(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_trains_in_mixed_precision(variant: dict) -> None:
    network = firing(**variant)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(*batch()).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
