"""SDiT against recordings of the released network, and its own options."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import diffusers.schedulers.scheduling_ddpm as ddpm
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from torch import Tensor

from datamodules.images import resize, to_array
from datamodules.loading import TrainingImages, to_bytes
from systems.checkpoints import CheckpointMismatchError
from systems.diffusion.learned_variance import RespacedDDPMScheduler
from systems.sdit import SDiT, read_official

FILE = "sdit_released_small.safetensors"
SIZES = {"image_size": 8, "embed_dim": 16, "num_inference_steps": 4}
pytestmark = pytest.mark.usefixtures("uncompiled")
PRECISIONS = [(torch.float64, ".f64", 1e-9), (torch.float32, "", 1e-5)]


def system(**arguments: object) -> SDiT:
    torch.manual_seed(0)
    return SDiT(**(SIZES | arguments))


def awake(**arguments: object) -> SDiT:
    """A system whose neurons fire and whose final layer is not zero, unlike at initialisation."""
    sdit = system(**arguments)
    for name, parameter in sdit.named_parameters():
        if name.endswith(("att.output.weight", "ffn.value.weight")):
            torch.nn.init.normal_(parameter, std=3.0)
        if name.endswith(("final_layer.linear.weight", "pos_embed")):
            torch.nn.init.normal_(parameter, std=0.1)
    return sdit


@pytest.fixture(scope="module")
def recorded(reference: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return reference(FILE)


def released(recorded: dict[str, Tensor], dtype: torch.dtype = torch.float32, **arguments: object) -> SDiT:
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    tensors, size = read_official(state)
    sdit = SDiT(**size, **arguments)
    sdit.network.load_state_dict(tensors)
    return sdit.to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.detach().double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), PRECISIONS)
def test_losses_are_the_recorded_ones(
    recorded: dict[str, Tensor], dtype: torch.dtype, suffix: str, tolerance: float
) -> None:
    sdit = released(recorded, dtype).train()
    outputs: list[Tensor] = []
    sdit.network.register_forward_hook(lambda module, inputs, output: outputs.extend([inputs[0], output]))
    images, noise = (recorded[f"loss.input.{name}"].to(dtype) for name in ("x_start", "noise"))
    t, labels = recorded["loss.input.t"], recorded["loss.input.y_train"]
    error, bound = sdit.loss_terms(images, t, noise, labels)
    x_t, output = outputs
    output.retain_grad()
    loss = error + bound
    loss.mean().backward()
    found = {"x_t": x_t, "model_output": output, "mse": error, "vb": bound, "loss": loss, "mean": loss.mean()}
    for name, value in found.items():
        assert relative(value, recorded[f"loss.{name}{suffix}"]) < tolerance, name
    tolerance = 1e-8 if dtype == torch.float64 else 2e-4
    assert output.grad is not None
    assert relative(output.grad, recorded["loss.grad.model_output.f64"]) < tolerance
    for name, parameter in sdit.network.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, recorded[f"loss.grad.param.{name}.f64"]) < tolerance, name


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), PRECISIONS)
def test_the_chain_is_the_recorded_one(
    recorded: dict[str, Tensor], dtype: torch.dtype, suffix: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain of the system itself, with the recorded noise and classes."""
    sdit = released(recorded, dtype, num_inference_steps=5).eval()
    draws = iter([recorded["sample.x_T"], *recorded["sample.noise"]])
    draw = lambda *args, **kwargs: next(draws).to(dtype)  # noqa: E731
    monkeypatch.setattr("systems.diffusion.gaussian.randn_tensor", draw)
    monkeypatch.setattr(ddpm, "randn_tensor", draw)
    monkeypatch.setattr(sdit, "labels", lambda seeds: recorded["sample.y"])
    estimates: list[Tensor] = []
    step = RespacedDDPMScheduler.step

    def spy(self: RespacedDDPMScheduler, *args: object, return_dict: bool, **kwargs: object) -> tuple[Tensor, Tensor]:
        result = step(self, *args, return_dict=False, **kwargs)
        estimates.append(result[1])
        return result

    monkeypatch.setattr(RespacedDDPMScheduler, "step", spy)
    with torch.no_grad():
        states = list(sdit.trajectory(torch.arange(2), (3, 8, 8)))
    assert sdit.nfe == len(estimates) == 5
    for i, (state, estimate) in enumerate(zip(states[1:], estimates, strict=True)):
        assert relative(state, recorded[f"sample.x{suffix}"][i]) < tolerance
        assert relative(estimate, recorded[f"sample.pred_xstart{suffix}"][i]) < tolerance


def test_images_are_prepared_and_written_as_recorded(recorded: dict[str, Tensor]) -> None:
    """CIFAR-10 is resized on 8 bits. Bytes are rounded; of exact halves one neighbour is taken."""
    image = Image.fromarray(recorded["resize.input_u8"].numpy())
    pixels = torch.from_numpy(to_array(resize(image, 28)).copy())
    assert torch.equal(pixels.permute(1, 2, 0), recorded["resize.output_u8"])
    (scaled,) = TrainingImages(pixels[None], torch.tensor([0])).__getitems__([0])
    torch.testing.assert_close(scaled, recorded["resize.normalised"], rtol=0, atol=1e-6)
    values = recorded["u8.input"]
    halves = (127.5 * values + 127.5) % 1 == 0.5
    written, expected = to_bytes(values).int(), recorded["u8.output"].int()
    assert torch.equal(written[~halves], expected[~halves])
    assert (written - expected).abs().max() <= 1


def test_class_and_noise_of_an_image_depend_only_on_its_seed() -> None:
    sdit = awake().eval()
    seeds = torch.arange(3)
    images = sdit.sample(seeds, (3, 8, 8))
    torch.testing.assert_close(sdit.sample(torch.tensor([2]), (3, 8, 8))[0], images[2], rtol=1e-3, atol=1e-3)
    labels = sdit.labels(torch.arange(20_000))
    assert labels is not None
    assert torch.equal(labels[5:8], sdit.labels(torch.arange(5, 8)))
    counts = labels.bincount(minlength=10)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5  # uniform: five standard deviations


def test_a_given_class_is_that_of_every_image() -> None:
    sdit, free = awake(label=7).eval(), awake().eval()
    assert sdit.labels(torch.arange(3)).tolist() == [7, 7, 7]
    seed = next(s for s in range(100) if free.labels(torch.tensor([s])).item() == 7)
    torch.testing.assert_close(*(s.sample(torch.tensor([seed]), (3, 8, 8)) for s in (sdit, free)))
    other = next(s for s in range(100) if free.labels(torch.tensor([s])).item() != 7)
    assert not torch.allclose(*(s.sample(torch.tensor([other]), (3, 8, 8)) for s in (sdit, free)))


def test_guidance_extrapolates_the_noise_from_the_withheld_class() -> None:
    sdit = awake(guidance=3.0).eval()
    x, t, seeds = torch.randn(2, 3, 8, 8), torch.tensor([500, 500]), torch.arange(2)
    y = sdit.labels(seeds)
    with torch.no_grad():
        found = sdit._predictor(seeds)(x, t)
        given, withheld = sdit.network(x, t, y), sdit.network(x, t, torch.full_like(y, 10))
    assert not torch.allclose(given, withheld)
    expected = withheld[:, :3] + 3 * (given[:, :3] - withheld[:, :3])
    torch.testing.assert_close(found, torch.cat([expected, given[:, 3:]], 1), rtol=1e-4, atol=1e-4)
    assert sdit.nfe == 2 * 4
    assert sdit.solver == "RespacedDDPM, guidance 3"


def test_classes_are_withheld_only_in_training() -> None:
    sdit = system(class_dropout=0.25)
    seen: list[Tensor] = []
    sdit.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    batch = torch.zeros(400, 1, 8, 8), torch.arange(400) % 10
    sdit.train().loss(batch, torch.Generator().manual_seed(0))
    sdit.eval().loss(batch, torch.Generator().manual_seed(0))
    assert 60 < int((seen[0] == 10).sum()) < 140
    assert torch.equal(seen[0][seen[0] != 10], batch[1][seen[0] != 10])
    assert torch.equal(seen[1], batch[1])


def test_grey_images_are_repeated_and_averaged() -> None:
    sdit = awake().eval()
    grey, colour = sdit.sample(torch.arange(2), (1, 8, 8)), sdit.sample(torch.arange(2), (3, 8, 8))
    torch.testing.assert_close(grey, colour.mean(1, keepdim=True))
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    losses = [sdit.loss((x, labels), torch.Generator().manual_seed(0)) for x in (images.repeat(1, 3, 1, 1), images)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DDPMScheduler(variance_type="fixed_large")])
def test_samplers_without_predicted_variance_receive_only_the_noise(scheduler: object) -> None:
    images = awake(scheduler=scheduler).eval().sample(torch.arange(2), (3, 8, 8))
    assert images.isfinite().all()
    assert images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_other_predictions_train_and_the_bound_spares_them(kind: str) -> None:
    """The bound trains only the variance channels, whatever the others predict."""
    sdit = awake(scheduler=RespacedDDPMScheduler(prediction_type=kind)).train()
    outputs: list[Tensor] = []
    sdit.network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    error, bound = sdit.loss_terms(images, torch.tensor([0, 500]), noise, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(bound.sum(), outputs[0], retain_graph=True)
    assert grad[:, :3].abs().max() == 0
    assert grad[:, 3:].any()
    (grad,) = torch.autograd.grad(error.sum(), outputs[0])
    assert grad[:, 3:].abs().max() == 0


def test_an_unconditional_model_ignores_classes() -> None:
    sdit = awake(num_classes=0).eval()
    assert sdit.labels(torch.arange(2)) is None
    assert sdit.sample(torch.arange(2), (3, 8, 8)).isfinite().all()
    assert sdit.loss(torch.zeros(2, 3, 8, 8)).isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_dropout": 1.0}, "class_dropout=1.0; give a probability"),
        ({"guidance": 2.0, "class_dropout": 0.0}, "guidance=2.0 needs a network that was also trained without classes"),
        ({"guidance": 2.0, "num_classes": 0}, "guidance=2.0 .* num_classes=0"),
        ({"label": 10}, "label=10; give a number from 0 to 9"),
        ({"label": -1}, "label=-1; give a number from 0 to 9"),
        ({"label": 7, "num_classes": 0}, "label=7, but the model is unconditional"),
        ({"image_size": 9}, "image_size=9 is not a multiple of patch_size=2"),
        ({"depth": 1}, "depth=1; give 2 or more"),
        ({"num_classes": -1}, "num_classes=-1; give 0 or more"),
    ],
)
def test_wrong_options_have_one_message(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        system(**arguments)


def test_missing_and_impossible_classes_have_one_message() -> None:
    sdit, images = system(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="images but no labels; a model of 10 classes takes"):
        sdit.loss(images)
    for labels in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match="give numbers from 0 to 9"):
            sdit.loss((images, torch.tensor(labels)))


def test_official_checkpoints_are_read_and_checked(recorded: dict[str, Tensor]) -> None:
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    tensors, size = read_official({f"module.{key}": value for key, value in state.items()})
    assert tensors.keys() == state.keys()
    assert size == {
        "in_channels": 3,
        "image_size": 8,
        "patch_size": 2,
        "embed_dim": 32,
        "depth": 4,
        "num_classes": 10,
    }
    with pytest.raises(CheckpointMismatchError, match=r"1 missing: conv\.bias"):
        read_official({key: value for key, value in state.items() if key != "conv.bias"})
    with pytest.raises(KeyError, match="x_embedder"):
        read_official({"a": torch.zeros(1)})


def test_the_optimiser_is_the_released_one() -> None:
    optimizer = system().configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["betas"], defaults["weight_decay"], defaults["eps"]) == (
        1e-4,
        (0.9, 0.999),
        0.01,
        1e-8,
    )


def test_a_checkpoint_of_the_former_design_of_this_name_is_refused() -> None:
    old = {"method": "sdit", "state_dict": {"network.position": torch.zeros(1)}}
    with pytest.raises(CheckpointMismatchError, match="of method 'spiking-rwkv', expected 'sdit'"):
        system().on_load_checkpoint(old)


def test_classes_are_drawn_as_documented() -> None:
    """A change would alter every image of every conditional model."""
    expected = [int.from_bytes(hashlib.sha256(f"class {s}".encode()).digest()[:8], "big") % 10 for s in range(5)]
    assert system().labels(torch.arange(5)).tolist() == expected


@pytest.mark.slow
def test_a_few_steps_teach_the_classes() -> None:
    """Images of class 0 are black, of class 1 white; so are then the samples."""
    sdit = system(num_classes=2, in_channels=1, image_size=4, depth=2, class_dropout=0.0, num_inference_steps=20)
    optimizer = torch.optim.AdamW(sdit.parameters(), 1e-2)
    labels = torch.arange(16) % 2
    images = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    for _ in range(200):
        loss = sdit.loss((images, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    samples = sdit.eval().sample(torch.arange(16), (1, 4, 4)).mean((1, 2, 3))
    assert torch.equal(samples > 0, sdit.labels(torch.arange(16)) == 1)
