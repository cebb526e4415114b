"""Tests that need a GPU: kernels against their definitions, networks and samplers against the CPU, the commands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from benchmark.callbacks.checkpointing import DivergenceError
from benchmark.cli import main
from benchmark.speed.sampling import SMALL
from benchmark.speed.suite import PAPER_SIZE
from benchmark.speed.timing import build_config
from leaderboard.evaluation.cost import CostMeter
from leaderboard.record.records import find_records
from systems.base import DiffusionSystem
from systems.networks.spiking_transformer import _gated_sum, receptance_gate
from systems.ops import compiled
from systems.ops.norms import add_normed, normalise, scaled
from systems.ops.quantise import Quantise
from systems.ops.scale_steps import ScaleSteps
from systems.ops.token_shift import TokenShift
from systems.ops.wkv import wkv
from systems.spiking.neurons import ConvertedNeuron, SpikingNeuron, membrane_output

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

NEURONS = {
    "IF": dict(beta=1.0),
    "LIF": dict(beta=0.5, input_scale=0.5),
    "FSDDIM": dict(beta=0.8, detach_reset=True, fire_at_threshold=False, spike_grad="triangle"),
    "soft": dict(beta=0.9, reset_mechanism="subtract"),
}
"""Published neurons, and one with soft reset."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def uncompiled_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs element-wise functions uncompiled, since compiling for float64 networks takes longer than the test."""
    monkeypatch.setattr(compiled, "COMPILE_FROM", 2**62)


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the output of a function, and the gradients of its inputs for a sum with different weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return y.detach(), torch.autograd.grad((y * weights).sum(), leaves)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("num_steps", [4, 16])
@pytest.mark.parametrize("name", NEURONS)
def test_neuron_kernels_equal_stepping(name: str, num_steps: int) -> None:
    neuron = SpikingNeuron(**NEURONS[name])
    x = random(num_steps, 3, 16, 36, 37)
    (fast, (fast_grad,)), (plain, (plain_grad,)) = gradients(neuron, x), gradients(neuron.stepwise, x)
    assert torch.equal(fast, plain)
    assert 0 < fast.mean() < 1
    torch.testing.assert_close(fast_grad, plain_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_in_float32_differ_only_at_the_threshold(name: str) -> None:
    """A fused multiply-add rounds once where two operations round twice."""
    neuron = SpikingNeuron(**NEURONS[name])
    x = random(4, 8, 16, 32, 32, dtype=torch.float32)
    (fast, (fast_grad,)), (plain, (plain_grad,)) = gradients(neuron, x), gradients(neuron.stepwise, x)
    same = (fast == plain).all(0)
    assert (~same).double().mean() < 1e-5
    torch.testing.assert_close(fast_grad[:, same], plain_grad[:, same], rtol=1e-4, atol=1e-5)


def test_spikes_have_the_dtype_of_autocast() -> None:
    neuron, x = SpikingNeuron(), random(4, 8, 16, 32, 32, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        spikes = neuron(x.float())
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes, neuron(x)), "bfloat16 currents are exact in float32"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
def test_norms_fused_into_neurons_equal_separate_norms(layout: str, training: bool) -> None:
    shape = (4, 3, 100, 48) if layout == "tokens" else (4, 3, 48, 10, 12)
    x = random(*shape)
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(shape)
    norm = (nn.BatchNorm1d if layout == "tokens" else nn.BatchNorm2d)(48).to("cuda", torch.float64).train(training)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_var):
            values.uniform_(0.5, 1.5)
    plain_norm, neuron = copy.deepcopy(norm), SpikingNeuron(beta=0.5)
    fast, fast_grads = gradients(lambda x, w, b: neuron(x, _with(norm, w, b)), x, norm.weight, norm.bias)
    plain, plain_grads = gradients(
        lambda x, w, b: neuron.stepwise(x, _with(plain_norm, w, b)), x, plain_norm.weight, plain_norm.bias
    )
    assert torch.equal(fast, plain)
    for a, b in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_mean, plain_norm.running_mean)
    torch.testing.assert_close(norm.running_var, plain_norm.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_time_embeddings_and_residuals_after_norms_equal_plain_sums(layout: str, training: bool) -> None:
    x, residual, temb = random(4, 3, 48, 10, 12), random(4, 3, 48, 10, 12), random(3, 48)
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)
    norm = nn.BatchNorm2d(48).to("cuda", torch.float64).train(training)
    neuron, weight, bias = SpikingNeuron(beta=0.5), norm.weight.detach() + 0.2, norm.bias.detach() + 0.3
    fast = gradients(lambda x, e, w, b: neuron(x, _with(norm, w, b), e), x, temb, weight, bias)
    plain = gradients(lambda x, e, w, b: neuron.stepwise(x, _with(norm, w, b), e), x, temb, weight, bias)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)

    def plain_sum(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return scaled(norm, normalise(_with(norm, w, b), x), 0.7) + r

    fast = gradients(lambda x, r, w, b: add_normed(_with(norm, w, b), x, r, 0.7), x, residual, weight, bias)
    torch.testing.assert_close(fast, gradients(plain_sum, x, residual, weight, bias), rtol=1e-9, atol=1e-9)


def _with(norm: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Replaces the parameters of a norm, so that a function can take them as inputs."""
    norm._parameters["weight"], norm._parameters["bias"] = weight, bias  # type: ignore[assignment]
    return norm


def stepped(x: Tensor, factors: Tensor) -> Tensor:
    return ScaleSteps.apply(x, factors)


def shifted(x: Tensor, mix: Tensor) -> Tensor:
    first, second, third = TokenShift.apply(x, mix, mix**2, 1 - mix)
    return first - 2 * second + third


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    return Quantise.apply(x, scale.abs().sum(), 3)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    return receptance_gate(x, x * weight.to(x.dtype))


def gated_sum(x: Tensor, factors: Tensor) -> Tensor:
    return _gated_sum(x, x.roll(1, -1), x.roll(1, 0), factors.view(-1, 1, 1).to(x.dtype))


def attended(x: Tensor, decay: Tensor) -> Tensor:
    return wkv(x, x.roll(1, -1), decay.abs() / 10, decay)


CASES: dict[Callable[..., Tensor], tuple[tuple[int, ...], int]] = {
    stepped: ((4, 6, 48, 10, 12), 4),
    shifted: ((6, 197, 96), 96),
    quantised: ((6, 48, 20, 20), 3),
    gated: ((6, 197, 96), 96),
    gated_sum: ((6, 197, 96), 6),
    attended: ((40, 197, 96), 96),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", CASES)
def test_kernels_equal_the_functions_on_the_cpu(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    shape, size = CASES[function]
    x, weights = random(*shape, dtype=dtype), random(size, dtype=torch.promote_types(dtype, torch.float32))
    found, found_grads = gradients(function, x, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "COMPILE_FROM", 2**62)
        wanted, wanted_grads = gradients(function, x.cpu(), weights.cpu())
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found.cpu(), wanted, **tolerance)
    torch.testing.assert_close(found_grads[0].cpu(), wanted_grads[0], **tolerance)
    if dtype == torch.float64:  # in bfloat16, long sums depend on their order
        torch.testing.assert_close(found_grads[1].cpu(), wanted_grads[1], rtol=1e-8, atol=1e-8)


def test_converted_neurons_equal_stepping() -> None:
    neuron, x = ConvertedNeuron(signed=True).cuda(), random(7, 3, 48, 20, 20)
    assert torch.equal(neuron(x), neuron.stepwise(x))


def test_readouts_are_not_rounded_to_tf32() -> None:
    x = random(8, 64, 64, dtype=torch.float32)
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        torch.testing.assert_close(membrane_output(x).double(), membrane_output(x.double()), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(products)


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> tuple[DiffusionSystem, DiffusionSystem, tuple[int, int, int]]:
    """A method of the small track in float64 with perturbed weights, on the CPU and on the GPU, and its image shape."""
    cli = build_config(f"small/{request.param}", "--model.num_inference_steps=5")
    system = cast(DiffusionSystem, cli.model).double().eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return system, copy.deepcopy(system).cuda(), cli.datamodule.image_shape


def test_replayed_samples_equal_those_of_the_cpu(
    small: tuple[DiffusionSystem, DiffusionSystem, tuple[int, int, int]],
    uncompiled_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, gpu, shape = small
    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(None), replay(graph)))
    images = [system.sample(torch.arange(4), shape).cpu() for system in (cpu, gpu)]
    torch.testing.assert_close(*images, rtol=1e-6, atol=1e-6)
    assert len(replays) == 4


def test_gradients_of_losses_equal_those_of_the_cpu(
    small: tuple[DiffusionSystem, DiffusionSystem, tuple[int, int, int]],
    uncompiled_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, gpu, shape = small
    images = torch.rand(4, *shape, dtype=torch.float64) * 2 - 1
    for name in ("randn", "randint", "rand"):  # the GPU's generator draws other numbers
        monkeypatch.setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name)))
    if not hasattr(cpu, "scheduler") and hasattr(cpu, "data_variance"):
        cpu.data_variance = gpu.data_variance = 0.1
    for system in (cpu, gpu):
        system.train()
        system.loss(images.to(system.device), torch.Generator(system.device).manual_seed(0)).backward()
    for (name, a), (_, b) in zip(cpu.named_parameters(), gpu.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def _drawn_on_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(*args: Any, device: Any = None, generator: Any = None, **kwargs: Any) -> Tensor:
        return draw(*args, generator=torch.Generator().manual_seed(0), **kwargs).to(device)

    return drawn


@pytest.mark.parametrize("name", SMALL)
def test_sampler_steps_do_not_synchronise(name: str, uncompiled_gpu: None) -> None:
    solver = ["--model.scheduler=DDIMScheduler"] if "ddpm" in name or "sdm" in name or "rwkv" in name else []
    cli = build_config(f"small/{name}", "--model.num_inference_steps=4", *solver)
    system = cast(DiffusionSystem, cli.model).cuda().eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        chain = system.trajectory(torch.arange(4), cli.datamodule.image_shape)
        for _ in range(3):  # noise, an eager step, a recorded step
            next(chain)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                next(chain)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", PAPER_SIZE)
def test_networks_of_paper_size_train_channels_last(name: str) -> None:
    """In one bfloat16 step, all convolutions except on images receive channels-last features."""
    cli = build_config(name)
    system = cast(DiffusionSystem, cli.model).cuda().train()
    layouts: list[bool] = []
    for module in system.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels >= 16:
            module.register_forward_pre_hook(
                lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.autocast("cuda", torch.bfloat16):
        loss = system.loss(torch.rand(8, *cli.datamodule.image_shape, device="cuda") * 2 - 1)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(layouts)


def test_replayed_cost_equals_that_of_the_cpu() -> None:
    cli = build_config("small/sddpm_mnist", "--model.num_inference_steps=5")
    counts = []
    for device in ("cpu", "cuda"):
        system = copy.deepcopy(cast(DiffusionSystem, cli.model)).double().to(device).eval()
        with CostMeter(cast(nn.Module, system.network), watch=False) as meter:
            system.sample(torch.arange(32), cli.datamodule.image_shape)
            counts.append(meter.take())
    assert counts[0] == counts[1]


def test_a_hook_that_is_not_replayable_sees_every_call(uncompiled_gpu: None) -> None:
    cli = build_config("small/sddpm_mnist", "--model.num_inference_steps=5")
    system, calls = cast(DiffusionSystem, cli.model).cuda().eval(), []
    cast(nn.Module, system.network).register_forward_hook(lambda *_: calls.append(None))
    system.sample(torch.arange(2), cli.datamodule.image_shape)
    assert len(calls) == 5


def test_commands_run(tmp_path: Path) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    fit = ["fit", "--config=configs/quickstart.yaml", "--trainer.max_steps=20", "--trainer.accelerator=gpu", *options]
    main([*fit, "--monitor.every_n_epochs=1", "--monitor.num_inference_steps=2"])
    main(["test", *options, "--draft", "--data.num_samples=200"])
    (record,) = map(Path.read_text, find_records([tmp_path]))
    assert torch.cuda.get_device_name() in record


def test_divergence_is_reported_one_step_later(tmp_path: Path) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    fit = ["fit", "--config=configs/quickstart.yaml", "--trainer.max_steps=9", "--trainer.accelerator=gpu", *options]
    with pytest.raises(DivergenceError, match=r"the loss is nan at step [1-9]"):
        main([*fit, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e30", "--monitor.every_n_epochs=0"])
    assert not list(tmp_path.glob("*/checkpoints/last.ckpt"))
