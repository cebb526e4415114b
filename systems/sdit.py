"""SDiT: class-conditional diffusion with an RWKV transformer whose blocks add spike rates to real-valued features.

S. Yang, H. Ma, C. Yu, A. Wang, E.-P. Li, "SDiT: Spiking Diffusion Model with Transformer", 2024,
https://arxiv.org/abs/2402.11588. Network, loss and sampler follow the public code https://github.com/foolLain/SDiT
(CC-BY-NC; no authors named, title and components match the paper), written anew from a description of it and checked
against recordings of it.

No weight matrix receives spikes, and the network runs once per diffusion step, not once per SNN step: by the strict
count it needs no accumulates, only multiply-accumulates (`systems/networks/rate_transformer.py`). The suite's fully
spiking design after the same paper is `systems.spiking_rwkv.SpikingRWKV`.

Departures from the release, each an option:

- Image sizes and datasets other than 28x28 with 10 classes. Images of one channel are repeated to the network's three,
  as released; of generated images the mean over the channels is compared.
- Guidance by withheld classes. The release has the option, but its network cannot run it; it is off by default.
- Other samplers than the released one of 250 steps, and without classes an unconditional network.

Loss: `SDiT.loss`. Sampler: `RespacedDDPMScheduler`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.optim import AdamW

from systems.base import Batch, LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import check_state, rename
from systems.diffusion.gaussian import GaussianDiffusion
from systems.diffusion.learned_variance import RespacedDDPMScheduler, posterior_tables, variational_bound
from systems.diffusion.prediction import to_x0
from systems.networks.checks import check_range
from systems.networks.rate_transformer import SDiTNetwork, rate_lif
from systems.ops.cuda_graphs import Replay
from systems.spiking.adapter import apply_options
from systems.spiking.neurons import NeuronFactory

NUM_CLASSES = 10
"""Classes of the released networks."""


class SDiT(GaussianDiffusion):
    """Class-conditional diffusion model of Yang et al., as released.

    Args:
        num_classes: Classes of the images; null takes those of the dataset (as released: 10). 0 makes an unconditional
            model.
        class_dropout: Probability that the class of a training image is withheld, as guidance needs.
        guidance: Scale s of guidance, `e_null + s (e_class - e_null)`; 1 is off, other values evaluate the network
            twice per step.
        label: Class of every generated image; null draws the class of each image from its seed, uniformly.
        threshold: Firing threshold of every neuron.
        neuron: Class of other neurons in place of the published one, with its options: of snnTorch, such as
            snntorch.Leaky, or systems.spiking.neurons.SpikingNeuron; `threshold` then scales their thresholds.
        scheduler: Noise schedule and sampler, a scheduler of diffusers; by default the released one.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM, from 0 to 1.
        optimizer: Optimiser; by default the released AdamW.
        lr_scheduler: Learning-rate schedule per step; the release has none.
        **kwargs: Arguments of `SDiTNetwork`.

    Raises:
        ValueError: If an option is out of range or options do not go together.
    """

    method = "sdit"
    predicts_variance = True
    network: SDiTNetwork

    def __init__(
        self,
        num_classes: int | None = None,
        class_dropout: float = 0.1,
        guidance: float = 1.0,
        label: int | None = None,
        threshold: float = 1.0,
        neuron: NeuronFactory | None = None,
        scheduler: SchedulerMixin | None = None,
        num_inference_steps: int = 250,
        eta: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        **kwargs: Any,
    ) -> None:
        num_classes = NUM_CLASSES if num_classes is None else num_classes
        published = partial(rate_lif, threshold=threshold)
        network = SDiTNetwork(num_classes=num_classes, neuron=neuron or published, **kwargs)
        if neuron is not None:
            apply_options(network, SDiT, threshold)
        scheduler = scheduler or RespacedDDPMScheduler()
        optimizer = optimizer or partial(AdamW, lr=1e-4, weight_decay=0.01, fused=True)
        super().__init__(network, scheduler, num_inference_steps, eta, optimizer, lr_scheduler)
        if not 0 <= class_dropout < 1:
            raise ValueError(f"class_dropout={class_dropout}; give a probability from 0 to below 1")
        if guidance != 1 and not (num_classes and class_dropout):
            reason = f"class_dropout={class_dropout}" if num_classes else "num_classes=0"
            raise ValueError(
                f"guidance={guidance} needs a network that was also trained without classes, but {reason}; give "
                "guidance 1 (off), or train a conditional model with --model.class_dropout 0.1"
            )
        if label is not None and not num_classes:
            raise ValueError(
                f"label={label}, but the model is unconditional (num_classes=0); omit the label, or train with classes"
            )
        if label is not None:
            check_range("label", label, 0, num_classes - 1)
        self.num_classes = num_classes
        self.class_dropout = class_dropout
        self.guidance = guidance
        self.with_labels = num_classes > 0
        self.conditional = float(guidance) if num_classes else None
        self.label = label
        self.num_steps = network.num_steps
        self.threshold = threshold
        self._tables = posterior_tables(self.scheduler.alphas_cumprod)  # float64, which not every device has
        self._tables_on: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def solver(self) -> str:
        """Name of the sampler, with the scale of guidance."""
        return super().solver if self.guidance == 1 else f"{super().solver}, guidance {self.guidance:g}"

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance doubles them."""
        return super().nfe * (1 if self.guidance == 1 else 2)

    def labels(self, seeds: Tensor) -> Tensor | None:
        """Returns the class of the image of each seed, `(B,)`; None for an unconditional model."""
        if not self.num_classes:
            return None
        if self.label is not None:
            return torch.full(seeds.shape, self.label)
        return torch.tensor([_draw(seed, self.num_classes) for seed in seeds.tolist()], dtype=torch.int64)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Returns the mean squared error of the noise plus the variational bound, which trains only the variances.

        Args:
            batch: Images `(B, C, H, W)` in [-1, 1] and their classes `(B,)`; only images for an unconditional model.
            generator: Source of the steps, the noise and the withheld classes.

        Raises:
            ValueError: If classes are missing or out of range.
        """
        images, labels = self._split(batch)
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        steps, device = self.scheduler.config.num_train_timesteps, images.device
        t = torch.randint(steps, (len(images),), generator=generator, device=device)
        if labels is not None and self.training:
            withheld = torch.rand(len(images), generator=generator, device=device) < self.class_dropout
            labels = torch.where(withheld, self.num_classes, labels)
        return torch.stack(self.loss_terms(images, t, noise, labels)).sum(0).mean()

    def loss_terms(self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns mean squared error and variational bound, in bits per dimension, of each image, `(B,)` each.

        Args:
            images: `x_0` `(B, C, H, W)` in [-1, 1], in the network's channels.
            t: Diffusion steps `(B,)`.
            noise: Standard normal, `(B, C, H, W)`.
            labels: Classes `(B,)`, `num_classes` where withheld; None for an unconditional model.
        """
        names, values = self._tables.keys(), self._tables_like(images)[:, t]
        rows = {name: value.view(-1, 1, 1, 1) for name, value in zip(names, values, strict=True)}
        a = 1 / rows["sqrt_recip_alphas_cumprod"]
        sigma = a * rows["sqrt_recipm1_alphas_cumprod"]  # 1 - a^2 would lose digits in float32
        x_t, v_t = a * images + sigma * noise, a * noise - sigma * images
        prediction, variance = self.network(x_t, t, labels).to(images.dtype).chunk(2, dim=1)
        kind = self.scheduler.config.prediction_type
        target = {"epsilon": noise, "sample": images, "v_prediction": v_t}[kind]
        error = (target - prediction).square().mean((1, 2, 3))
        x_0 = to_x0(prediction.detach(), x_t, a, sigma, kind)
        return error, variational_bound(images, x_t, x_0, variance, t == 0, rows)

    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields `x_T`, ..., `x_0`; noise and class of image `k` are drawn with the seed `seeds[k]`."""
        channels = self.network.image_shape[0]
        for x in super().trajectory(seeds, (channels, *image_shape[1:])):
            yield x.mean(1, keepdim=True) if image_shape[0] == 1 else x

    def setup(self, stage: str) -> None:
        """Checks the classes of the data module, if there is one, and asks it for labels.

        Raises:
            ValueError: If the dataset has another number of classes.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        is_trained = stage in ("fit", "validate") and self.num_classes and data is not None
        if is_trained and self.num_classes != data.num_classes:
            has = f"{data.num_classes} classes" if data.num_classes else "no classes"
            raise ValueError(
                f"num_classes={self.num_classes}, but {data.title} has {has}; give --model.num_classes "
                f"{data.num_classes or 0}{'' if data.num_classes else ' (unconditional)'}, or another dataset"
            )
        super().setup(stage)

    def _predictor(self, seeds: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        labels = self.labels(seeds)
        y = None if labels is None else labels.to(self.device)
        channels = self.network.image_shape[0]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if self.guidance == 1:
                output = self.network(x, t, y)
            else:
                assert y is not None, "guidance without classes is refused at construction"
                twice = torch.cat([y, torch.full_like(y, self.num_classes)])
                given, withheld = self.network(x.repeat(2, 1, 1, 1), t.repeat(2), twice).chunk(2)
                guided = withheld[:, :channels].lerp(given[:, :channels], self.guidance)
                output = torch.cat([guided, given[:, channels:]], dim=1)
            return output if self.passes_variance else output[:, :channels]

        return Replay(predict, self.network)

    def _split(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns images in the network's channels, and their classes.

        Raises:
            ValueError: If classes are missing or out of range.
        """
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        if images.shape[1] == 1:
            images = images.expand(-1, self.network.image_shape[0], -1, -1)
        if not self.num_classes:
            return images, None
        if labels is None:
            raise ValueError(
                f"the batch has images but no labels; a model of {self.num_classes} classes takes (images, labels), or "
                "train without classes: --model.num_classes 0"
            )
        if not labels.is_cuda and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())}; give numbers from 0 to "
                f"{self.num_classes - 1}, one per image"
            )
        return images, labels

    def _tables_like(self, images: Tensor) -> Tensor:
        """Returns the posterior tables `(tables, n)` in the dtype and on the device of images."""
        key = images.device, images.dtype
        if key not in self._tables_on:
            self._tables_on[key] = torch.stack(list(self._tables.values())).to(*key)
        return self._tables_on[key]


def _draw(seed: int, num_classes: int) -> int:
    """Draws a class from a seed, independently of the noise that is drawn with it."""
    return int.from_bytes(hashlib.sha256(f"class {seed}".encode()).digest()[:8], "big") % num_classes


def read_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Checks the tensors of a released checkpoint, whose names the network has.

    Args:
        state: Released state dict (`model`); a `module.` prefix is removed.

    Returns:
        The network's state dict, and its size as arguments of the system.

    Raises:
        KeyError: If it is not the state dict of such a network; names the first missing tensor.
        CheckpointMismatchError: If tensors are unexpected, missing or of another shape; lists them.
    """
    renamed = rename(state, lambda key: key.removeprefix("module."))
    embed_dim, in_channels, patch_size, _ = renamed["x_embedder.proj.weight"].shape
    patches = renamed["pos_embed"].shape[1] - 1
    in_blocks = {key.split(".")[1] for key in renamed if key.startswith("in_blocks.")}
    arguments = {
        "in_channels": in_channels,
        "image_size": round(patches**0.5) * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": 2 * len(in_blocks),
        "num_classes": len(renamed["y_embedder.embedding_table.weight"]) - 1,
    }
    with torch.device("meta"):
        network = SDiTNetwork(**arguments)
    check_state(renamed, network, "the official checkpoint")
    return renamed, arguments
