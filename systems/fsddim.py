"""FSDDIM: a diffusion model that denoises synaptic currents, so that its whole sampling chain can run on spikes.

R. Watanabe, Y. Mukuta, T. Harada, "Fully Spiking Denoising Diffusion Implicit Models", 2023,
https://arxiv.org/abs/2312.01742; authors' code https://github.com/mil-tokyo/FSDDIM.

An image is encoded once as currents that are equal in all `T` SNN time steps, and decoded once, as their mean. In
between, DDIM updates the currents of each SNN step separately, `X[t-1] = p X[t] + q network(X[t], t)`, without
decoding, clipping or noise. Training fits the decoded prediction to `v` and penalises the variance of the currents over
the SNN steps (synaptic current learning), since the network is trained only on currents that are equal in all steps.

Departures: `norm: plain` is the default, because the released trainer uses it in place of the paper's tdBN; a chain may
have fewer than `num_train_timesteps` steps, evenly spaced from the noisy end. Costs follow the suite's rule for all
methods, which counts a convolution after a resampling layer as multiply-accumulates of real values. The released
counter traces such currents back to the spikes before pooling or upsampling, and omits the convolutions within these
layers: at full size (T = 8, 32x32, one channel) it counts 2.57 G MACs per network evaluation, the suite 6.82 G.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam

from systems.base import DiffusionSystem, LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import check_state
from systems.diffusion.prediction import noise_images, velocity
from systems.networks.checks import check_range
from systems.networks.fsddim_fused import FusedRecurrence
from systems.networks.fsddim_unet import LIF, FSDDIMUNet
from systems.ops.cuda_graphs import Replay
from systems.ops.quantise import PLAIN_BITS
from systems.spiking.adapter import apply_options
from systems.spiking.neurons import NeuronFactory
from systems.spiking.relu import ReLULayer
from systems.spiking.steps import fold, to_channels_last_on_gpu, unfold
from systems.spiking.surrogates import get_surrogate
from systems.twins import check_not_quantised, check_twin, twin_name


def cosine_schedule(num_train_timesteps: int) -> Tensor:
    """Returns the cosine noise schedule (Nichol and Dhariwal, arXiv 2102.09672), in float64.

    Returns:
        `alphas_cumprod`, the signal power after each step, `(num_train_timesteps,)`.
    """
    fraction = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    power = torch.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - power[1:] / power[:-1]).clamp(0, 0.999)
    return (1 - betas).cumprod(0)


def ddim_coefficients(alphas_cumprod: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `p`, `q` of deterministic DDIM for `v`-prediction, a rotation: `x[t_previous] = p x[t] + q v`.

    Args:
        alphas_cumprod: Signal powers at the steps `t`.
        previous: Signal powers at the next steps of the chain; 1 after the last.

    Returns:
        `p` and `q`, each of the shape of `alphas_cumprod`.
    """
    angle = alphas_cumprod.sqrt().acos() - previous.sqrt().acos()
    return angle.cos(), -angle.sin()


def encode(images: Tensor, num_steps: int) -> Tensor:
    """Encodes images `(B, C, H, W)` as constant currents `(T, B, C, H, W)`."""
    return images.expand(num_steps, *images.shape)


def decode(currents: Tensor) -> Tensor:
    """Decodes currents `(T, B, C, H, W)` to images `(B, C, H, W)` as their mean, so that `decode(encode(x))` is `x`."""
    return currents.mean(0)


class FSDDIM(DiffusionSystem):
    """Fully spiking DDIM of Watanabe et al.

    Args:
        num_steps: SNN time steps T (paper: 4 or 8).
        beta: Membrane decay per SNN step, the paper's tau.
        threshold: Firing threshold of every neuron; values near 1 at test time are threshold guidance.
        reset_mechanism: `zero` (published), or `subtract`, before the decay.
        spike_grad: Surrogate gradient: a name of snntorch.surrogate, triangle or rectangle.
        neuron: Class of other neurons in place of the published one, with its options: of snnTorch, such as
            snntorch.Leaky, or systems.spiking.neurons.SpikingNeuron; `threshold` then scales their thresholds. `relu`
            makes the ReLU twin (`systems.twins`) and needs `num_steps` 1; synaptic current learning has no effect then.
        activation_bits: Bits of the activations of a ReLU twin, 1 to 8; 32 is a plain ReLU. `ceil(log2(T + 1))` bits, 3
            for T = 4, have at least as many levels as neurons have spike counts in `T` steps.
        num_train_timesteps: Diffusion steps of training.
        max_time: Rows of the time embedding's table, one for each diffusion step, or more.
        num_inference_steps: Diffusion steps of the sampler (published: all).
        image_weight: Weight of the loss of the decoded prediction.
        reconstruction_weight: Weight of synaptic current learning, the variance of the currents over SNN steps.
        spike_weight: Weight of the loss of the prediction before decoding (published: off).
        normalise_reconstruction: Whether the weight of synaptic current learning at diffusion step t, the magnitude of
            DDIM's `q`, is divided by its maximum, reached at t = 0 (published: yes).
        fused: Whether the sampler merges output layer, DDIM update and input layer; images are equal up to rounding.
        optimizer: Optimiser; by default the released Adam with lr 5e-4.
        lr_scheduler: Learning-rate schedule per step.
        **kwargs: Arguments of `FSDDIMUNet`.

    Raises:
        ValueError: If an option is out of range.
    """

    method = "fsddim"
    network: FSDDIMUNet

    def __init__(
        self,
        num_steps: int = 8,
        beta: float = 0.8,
        threshold: float = 1.0,
        reset_mechanism: Literal["zero", "subtract"] = "zero",
        spike_grad: str = "triangle",
        neuron: Literal["relu"] | NeuronFactory | None = None,
        activation_bits: int = PLAIN_BITS,
        num_train_timesteps: int = 1000,
        max_time: int = 1000,
        num_inference_steps: int = 1000,
        image_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        spike_weight: float = 0.0,
        normalise_reconstruction: bool = True,
        fused: bool = False,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        **kwargs: Any,
    ) -> None:
        optimizer = optimizer or partial(Adam, lr=5e-4, fused=True)
        super().__init__(optimizer, lr_scheduler)
        check_range("num_steps", num_steps, 1)
        check_range("num_inference_steps", num_inference_steps, 1, num_train_timesteps)
        if num_train_timesteps > max_time:
            raise ValueError(
                f"num_train_timesteps={num_train_timesteps}, but the time embedding has only max_time={max_time} "
                f"rows; give --model.max_time {num_train_timesteps} or more"
            )
        self.num_steps = num_steps
        self.num_inference_steps = num_inference_steps
        self.loss_weights = {"image": image_weight, "reconstruction": reconstruction_weight, "spike": spike_weight}
        if min(self.loss_weights.values()) < 0 or max(self.loss_weights.values()) == 0:
            given = ", ".join(f"{name}_weight={weight}" for name, weight in self.loss_weights.items())
            raise ValueError(f"{given}; give weights of 0 or more, one of them above 0")
        published = {"beta": beta, "reset_mechanism": reset_mechanism, "spike_grad": spike_grad}
        make: NeuronFactory
        if neuron == "relu":
            check_twin(FSDDIM, num_steps, threshold=threshold, **published)
            if fused:
                raise ValueError(
                    "fused=true merges layers so that the sampling chain runs on spikes, which a ReLU twin does not "
                    "have; give --model.fused false"
                )
            make = partial(ReLULayer, activation_bits)
        else:
            check_not_quantised(FSDDIM, activation_bits)
            options = {"beta": beta, "threshold": threshold, "reset_mechanism": reset_mechanism}
            make = neuron or partial(LIF, **options, spike_grad=get_surrogate(spike_grad))
        self.network = FSDDIMUNet(max_time=max_time, neuron=make, **kwargs)
        if callable(neuron):
            apply_options(self.network, FSDDIM, threshold, **published)
        self.method = twin_name(self.method, activation_bits if neuron == "relu" else None)
        self.recurrence = FusedRecurrence(self.network) if fused else None
        if self.recurrence is not None:
            self.network.add_module("recurrence", self.recurrence)  # so that the cost meter of the network sees it
            if self.recurrence.real_channels:
                warnings.warn(self.recurrence.transmitted, stacklevel=2)
        self.alphas_cumprod = cosine_schedule(num_train_timesteps)
        _, q = self._coefficients(torch.arange(num_train_timesteps).flip(0))
        reconstruction = q.abs().flip(0)
        if normalise_reconstruction:
            reconstruction = reconstruction / reconstruction.max()
        power = self.alphas_cumprod
        for name, values in (("signal_power", power), ("signal", power.sqrt()), ("sigma", (1 - power).sqrt())):
            self.register_buffer(name, values.float(), persistent=False)
        self.register_buffer("reconstruction_factor", reconstruction.float(), persistent=False)

    @property
    def solver(self) -> str:
        """Name of the sampler."""
        return "DDIM in currents, fused" if self.recurrence is not None else "DDIM in currents"

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_inference_steps

    @property
    def process(self) -> dict[str, int]:
        """Option fixed by training: the number of diffusion steps, which determines the noise schedule."""
        return {"num_train_timesteps": len(self.alphas_cumprod)}

    def loss_terms(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Returns the unweighted loss terms of images `(B, C, H, W)` in [-1, 1], each at a uniform random step.

        With the target `v`, predicted currents `O`, decoding `D`, encoding `E` and signal power `abar`, the means of:

        - `image`: `abar (D(O) - v)^2`;
        - `spike`: `abar (O - E(v))^2`;
        - `reconstruction`: `r (E(D(O)) - O)^2`, with `r = |q|`, the magnitude of DDIM's `q` at this step.
        """
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        num_train_timesteps = len(self.alphas_cumprod)
        t = torch.randint(num_train_timesteps, (len(images),), generator=generator, device=images.device)
        return self.loss_terms_at(images, noise, t)

    def loss_terms_at(self, images: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Returns the loss terms for given noise `(B, C, H, W)` and diffusion steps `(B,)`; see `loss_terms`."""
        power, factor = self.get_buffer("signal_power")[t], self.get_buffer("reconstruction_factor")[t]
        signal, sigma = (self.get_buffer(name)[t].view(-1, 1, 1, 1) for name in ("signal", "sigma"))
        noisy, v = noise_images(images, noise, signal, sigma), velocity(images, noise, signal, sigma)
        out = self.network(encode(noisy, self.num_steps), t).to(v.dtype)  # (T, B, C, H, W)
        decoded = decode(out)
        variance = (out - decoded).square().mean((0, 2, 3, 4))  # (B,), over SNN time steps
        image = (decoded - v).square().mean((1, 2, 3))
        return {
            "image": (power * image).mean(),
            "reconstruction": (factor * variance).mean(),
            "spike": (power * (image + variance)).mean(),  # mean square = squared mean + variance
        }

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the weighted sum of the loss terms."""
        return self._weigh(self.loss_terms(images, generator))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the loss of a batch of images and logs its terms, unweighted."""
        terms = self.loss_terms(batch)
        loss = self._weigh(terms)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        self.log_dict({f"train/loss_{name}": term for name, term in terms.items()}, batch_size=len(batch))
        return loss

    def _weigh(self, terms: dict[str, Tensor]) -> Tensor:
        weighted = [weight * terms[name] for name, weight in self.loss_weights.items() if weight]
        return torch.stack(weighted).sum()

    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields the decoded `X_T`, ..., `X_0` `(B, C, H, W)`, the last clamped; `seeds[k]` determines image `k`."""
        for step, currents in enumerate(self.currents(seeds, image_shape)):
            images = decode(currents)
            yield images.clamp(-1, 1) if step == self.num_inference_steps else images

    def currents(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields the synaptic currents `X_T`, ..., `X_0` `(T, B, C, H, W)`."""
        return self.denoise(encode(self.noise(seeds, image_shape), self.num_steps))

    def denoise(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the currents `(T, B, C, H, W)`, first `x` itself and then the result of each DDIM step."""
        timesteps = self._timesteps()
        p, q = self._coefficients(timesteps)
        chain = list(zip(timesteps.tolist(), p.tolist(), q.tolist(), strict=True))
        yield x
        if self.recurrence is not None:
            yield from self._denoise_fused(x, chain, self.recurrence)
            return
        network = Replay(self.network, self.network)
        for t, p_t, q_t in chain:
            x = p_t * x + q_t * network(x, self._at(t, x)).to(x.dtype)
            yield x

    def _denoise_fused(
        self, x: Tensor, chain: list[tuple[int, float, float]], recurrence: FusedRecurrence
    ) -> Iterator[Tensor]:
        """Runs the same chain as a recurrence of the input layer's output current `A`; `x` is only accumulated.

        `A[t-1] = p (A[t] - b) + b + q (W s[t] + M)`, with the transmitted features `s`, the input layer's bias `b`,
        the composition `W` of output and input layer, and the output layer's bias mapped by the input layer, `M`.
        """
        recurrence.merge(self.network, x.shape[-2:])
        current = unfold(to_channels_last_on_gpu(self.network.conv_in(fold(x))), self.num_steps)
        step = Replay(lambda current, t: recurrence(self.network.features(current, t)), self.network)
        for t, p_t, q_t in chain:
            into_current, into_x = step(current, self._at(t, x))
            x = p_t * x + q_t * into_x.to(x.dtype)
            yield x
            current = p_t * (current - recurrence.bias) + recurrence.bias + q_t * into_current.to(x.dtype)

    @staticmethod
    def _at(t: int, x: Tensor) -> Tensor:
        return torch.full((x.shape[1],), t, device=x.device)

    def _timesteps(self) -> Tensor:
        """Returns the diffusion steps of the chain, equally spaced, noisiest first."""
        spacing = len(self.alphas_cumprod) / self.num_inference_steps
        return (torch.arange(self.num_inference_steps, 0, -1, dtype=torch.float64) * spacing).round().long() - 1

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        power = self.alphas_cumprod[timesteps]
        return ddim_coefficients(power, torch.cat([power[1:], power.new_ones(1)]))


def read_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a released FSDDIM checkpoint.

    The norm (`plain` or `tdbn`) and the number of SNN time steps cannot be read from it.

    Args:
        state: Its `model_state_dict`; the last axis (of size 1) of kernels is removed.

    Returns:
        The tensors under the names of `FSDDIMUNet`, and its size as arguments of `FSDDIM`.

    Raises:
        KeyError: If it is not the state dict of such a network; names the first missing tensor.
        CheckpointMismatchError: If tensors are unexpected, missing or of another shape; lists them.
    """
    base_channels, in_channels = state["conv_in.weight"].shape[:2]
    num_res_blocks = 0
    while f"downs.0.{num_res_blocks}.conv1.weight" in state:
        num_res_blocks += 1
    ends: list[int] = []
    while f"downs.{len(ends)}.0.conv1.weight" in state:
        stem = f"downs.{len(ends)}.{num_res_blocks}"
        pooled = f"{stem}.conv.1.weight"
        ends.append(len(state[pooled if pooled in state else f"{stem}.weight"]))
    if not ends:
        raise KeyError("downs.0.0.conv1.weight")
    tensors = {
        key.replace("conv_in.bn.", "bn_in."): value.squeeze(-1) if value.dim() == 5 else value
        for key, value in state.items()
    }
    arguments: dict[str, Any] = {
        "in_channels": in_channels,
        "base_channels": base_channels,
        "channel_mult": [end // base_channels for end in ends],
        "num_res_blocks": num_res_blocks,
        "num_train_timesteps": len(state["pe"]),
        "max_time": len(state["pe"]),
        "activate_first_conv": "conv_in.bn.weight" in state,
    }
    with torch.device("meta"):
        network = FSDDIM(**arguments, num_inference_steps=1).network
    check_state(tensors, network, "the official checkpoint")
    return tensors, arguments
