"""Spiking-Diffusion: absorbing-state diffusion of the code indices of a spiking vector-quantised autoencoder.

M. Liu, J. Gan, R. Wen, T. Li, Y. Chen, H. Chen, "Spiking-Diffusion: Vector Quantized Discrete Diffusion Model with
Spiking Neural Networks", https://arxiv.org/abs/2308.10187; authors' code https://github.com/Arktis2022/Spiking-Diffusion.
Diffusion process: Bond-Taylor et al., "Unleashing Transformers", ECCV 2022, https://arxiv.org/abs/2111.12701.

Training has two stages. Stage one trains the autoencoder (`systems/networks/vq_svae.py`) on images. Then it is frozen,
the training images are encoded once as grids of code indices, and stage two trains the denoiser
(`systems/networks/sdid.py`) to predict masked codes. At step `t` of `num_train_timesteps` each token is masked with
probability `t / num_train_timesteps`.

Departures: neurons start from zero in every network call (in the released code, potentials of one batch carry over to
the next while indices are extracted); the batches of stage two are shuffled in each epoch (`fixed_batches` does as
released); pixels are rounded to bytes, not truncated. As released, a sampler with `n < num_train_timesteps` steps
visits `t = n, ..., 1`, so that the denoiser is not evaluated at the steps above `n`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from systems.base import DiffusionSystem, LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import check_state, read_trained, training_data_of
from systems.diffusion.absorbing import Objective, denoising_loss, unmask
from systems.figures import Figure, perplexity, plot_reconstructions, plot_usage
from systems.networks.checks import check_range
from systems.networks.sdid import SDID
from systems.networks.vq_svae import REDUCTION, VQSVAE, Reconstruction, equilibrium_loss
from systems.spiking.adapter import apply_options
from systems.spiking.neurons import NeuronFactory, leaky_integrate_and_fire
from systems.spiking.surrogates import get_surrogate

COLLAPSED = 0.1
"""The codebook counts as collapsed if a smaller share of its codes is in use.

Perplexity is not a criterion: one code represents the empty background, so that even a healthy codebook of MNIST has a
perplexity of only about 5.
"""

SSIM_WINDOW = 11
"""Side length in pixels of the Gaussian window of structural similarity, whose standard deviation is 1.5."""

SHOWN_IMAGES = 8
"""Images in the figure of reconstructions."""


class SpikingDiffusion(DiffusionSystem):
    """Spiking-Diffusion of Liu et al.

    One `fit` trains both stages and ends by itself; training resumes in the stage in which the checkpoint was written.
    In both stages, an epoch is one pass over the training images. The codes of stage two are computed once, from images
    that are not mirrored, regardless of `--data.flip`.

    Args:
        in_channels: Image channels.
        num_codes: Size of the codebook.
        code_channels: Dimension of a code.
        autoencoder_channels: Channels of the autoencoder's first layer.
        base_channels: Channels of the denoiser's first layer.
        num_steps: SNN time steps T of both networks.
        threshold: Firing threshold of every neuron; values near 1 at test time are threshold guidance.
        spike_grad: Surrogate gradient: a name of snntorch.surrogate, triangle or rectangle.
        neuron: Class of other neurons in place of the published one, with its options: of snnTorch, such as
            snntorch.Leaky, or systems.spiking.neurons.SpikingNeuron; `threshold` then scales their thresholds.
        mask_id: Index of a masked token: num_codes by default, or a code that doubles as the mask.
        num_train_timesteps: Diffusion steps; as published, the number of tokens, a sixteenth of the pixels.
        num_inference_steps: Diffusion steps of the sampler, at most num_train_timesteps, which is the default.
        temperature: Divides the logits during sampling; values below 1 favour likely codes.
        objective: Likelihood bound of stage two, reweighted (published) or plain.
        fixed_batches: Whether stage two uses the same batches in each epoch, as released.
        autoencoder_epochs: Epochs of stage one.
        denoiser_epochs: Epochs of stage two; 0 trains only stage one.
        init_from: Checkpoint with a trained stage one; only stage two is trained.
        data_variance: Variance of the training images in [0, 1], which divides the reconstruction error; measured by
            default.
        autoencoder_optimizer: Optimiser of stage one; by default the released AdamW (lr and weight decay 1e-3).
        denoiser_optimizer: Optimiser of stage two, likewise.
        lr_scheduler: Learning-rate schedule of each stage, which counts the steps of that stage; the release has none.
        gradient_clip_val: Largest norm of the gradient of a step, in place of the trainer's option of this name, which
            Lightning does not apply to methods with several optimisers; None does not clip.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    method = "spiking-diffusion"
    network: nn.ModuleDict
    trains_in_parts = True

    def __init__(
        self,
        in_channels: int = 1,
        num_codes: int = 128,
        code_channels: int = 16,
        autoencoder_channels: int = 32,
        base_channels: int = 64,
        num_steps: int = 16,
        threshold: float = 1.0,
        spike_grad: str = "atan",
        neuron: NeuronFactory | None = None,
        mask_id: int | None = None,
        num_train_timesteps: int = 49,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        objective: Objective = "reweighted_elbo",
        fixed_batches: bool = False,
        autoencoder_epochs: int = 100,
        denoiser_epochs: int = 200,
        init_from: str | None = None,
        data_variance: float | None = None,
        autoencoder_optimizer: OptimizerFactory | None = None,
        denoiser_optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        gradient_clip_val: float | None = None,
    ) -> None:
        released = partial(AdamW, lr=1e-3, weight_decay=1e-3, fused=True)
        super().__init__(autoencoder_optimizer or released, lr_scheduler)
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"gradient_clip_val={gradient_clip_val} is not a norm; give a number above 0, or null")
        if mask_id is not None and not 0 <= mask_id <= num_codes:
            raise ValueError(
                f"mask_id={mask_id} is outside the codebook of {num_codes} codes; give 0 to {num_codes - 1} for a code "
                f"that doubles as the mask, or {num_codes} for a separate mask symbol"
            )
        check_range("num_train_timesteps", num_train_timesteps, 1)
        num_inference_steps = num_train_timesteps if num_inference_steps is None else num_inference_steps
        check_range("num_inference_steps", num_inference_steps, 1, num_train_timesteps)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} cannot divide logits; give a number above 0")
        check_range("autoencoder_epochs", autoencoder_epochs, 0)
        check_range("denoiser_epochs", denoiser_epochs, 0)
        if data_variance is not None and not data_variance > 0:
            raise ValueError(f"data_variance={data_variance} cannot divide an error; give a number above 0")
        make = neuron or partial(leaky_integrate_and_fire, threshold=threshold, spike_grad=get_surrogate(spike_grad))
        self.network = nn.ModuleDict(
            {
                "autoencoder": VQSVAE(in_channels, num_codes, code_channels, autoencoder_channels, num_steps, make),
                "denoiser": SDID(num_codes, base_channels, num_steps, make),
            }
        )
        if neuron is not None:
            apply_options(self.network, SpikingDiffusion, threshold, spike_grad=spike_grad)
        self.automatic_optimization = False  # each stage has its own optimiser
        self.num_codes = num_codes
        self.num_steps = num_steps
        self.threshold = threshold
        self.mask_id = num_codes if mask_id is None else mask_id
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_steps = num_inference_steps
        self.temperature = temperature
        self.objective: Objective = objective
        self.fixed_batches = fixed_batches
        self.autoencoder_epochs = 0 if init_from else autoencoder_epochs
        self.denoiser_epochs = denoiser_epochs
        self.init_from = init_from
        self.data_variance = data_variance
        self.gradient_clip_val = gradient_clip_val
        self._denoiser_optimizer = denoiser_optimizer or released
        self._in_stage_two = self.autoencoder_epochs == 0
        self._codes: Tensor | None = None  # of all training images, (N, h, w)
        self._order = torch.empty(0, dtype=torch.long)  # of the codes in this epoch of stage two
        self._usage = torch.zeros(num_codes, dtype=torch.long)
        self._shown: Tensor | None = None  # images of the figure of reconstructions
        self._collapse_reported = False

    @property
    def autoencoder(self) -> VQSVAE:
        """Network of stage one."""
        return cast(VQSVAE, self.network["autoencoder"])

    @property
    def denoiser(self) -> SDID:
        """Network of stage two."""
        return cast(SDID, self.network["denoiser"])

    @property
    def step_network(self) -> nn.Module:
        """The denoiser, since the decoder runs only once."""
        return self.denoiser

    @property
    def solver(self) -> str:
        """Name of the sampler, with its temperature if it is not 1."""
        return "absorbing" if self.temperature == 1 else f"absorbing(temperature={self.temperature:g})"

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser per image; the decoder runs only once."""
        return self.num_inference_steps

    @property
    def generates(self) -> bool:
        """Whether stage two has begun."""
        return self._in_stage_two

    # Training

    def configure_optimizers(self) -> Any:
        """Returns the optimisers of both stages, and their learning-rate schedules if set."""
        optimizers: list[Any] = [
            self._optimizer(self.autoencoder.parameters()),
            self._denoiser_optimizer(self.denoiser.parameters()),
        ]
        for optimizer in optimizers:
            optimizer._step_supports_amp_scaling = False  # else gradients of fused optimisers are not clipped
        if self._lr_scheduler is None:
            return optimizers
        return optimizers, [self._lr_scheduler(optimizer) for optimizer in optimizers]

    def setup(self, stage: str) -> None:
        """Measures the data variance, loads stage one from `init_from` if given, and sets the number of epochs.

        Raises:
            ValueError: If there is nothing to train, stage two has no trained stage one, or scaled gradients would be
                clipped.
            CheckpointMismatchError: If `init_from` is of another method or size.
        """
        if stage in ("fit", "validate") and self.data_variance is None:
            self.data_variance = _variance(_in_order(self.trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
        if stage != "fit":
            return
        if self.gradient_clip_val is not None and self.trainer.precision == "16-mixed":
            raise ValueError(
                "gradient_clip_val would clip the scaled gradients of --trainer.precision 16-mixed; give bf16-mixed or "
                "32-true, or leave --model.gradient_clip_val out"
            )
        epochs = self.autoencoder_epochs + self.denoiser_epochs
        if not epochs:
            raise ValueError(
                "autoencoder_epochs=0, denoiser_epochs=0: nothing to train; give --model.denoiser_epochs 1 or more"
            )
        if self._in_stage_two and not self.trainer.ckpt_path:
            if self.init_from is None:
                raise ValueError(
                    "stage two needs the codes of stage one; give --model.init_from CHECKPOINT with a stage one, or "
                    "--model.autoencoder_epochs 1 or more"
                )
            checkpoint = read_trained(self.init_from, self.method)
            prefix = "network.autoencoder."
            state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
            check_state(state, self.autoencoder, self.init_from)
            self.autoencoder.load_state_dict(state)
            self.training_data = training_data_of(checkpoint)
        if not 0 <= (-1 if self.trainer.max_epochs is None else self.trainer.max_epochs) <= epochs:
            self.trainer.fit_loop.max_epochs = epochs

    def on_train_start(self) -> None:
        """Enters the current stage, also if training resumes within an epoch, without `on_train_epoch_start`."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Enters the current stage, and shuffles the codes of stage two."""
        self._in_stage_two = self.current_epoch >= self.autoencoder_epochs
        if not self._in_stage_two:
            self._usage = torch.zeros(self.num_codes, dtype=torch.long, device=self.device)
            return
        if self._codes is None:
            self._codes = self._extract()
            self._usage = self._codes.flatten().long().bincount(minlength=self.num_codes)
            self._warn_of_collapse()
        epoch = 0 if self.fixed_batches else self.current_epoch
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) + epoch  # as for the order of images in stage one
        order = torch.randperm(len(self._codes), generator=torch.Generator().manual_seed(seed))
        self._order = order[self.global_rank :: self.trainer.world_size]

    @torch.no_grad()
    def _extract(self) -> Tensor:
        """Returns the codes of all training images, `(N, h, w)`, computed in evaluation mode."""
        dtype = torch.uint8 if self.num_codes <= 256 else torch.int32
        batches = _in_order(cast(DataLoader[Tensor], self.trainer.train_dataloader))
        with _evaluating(self.autoencoder) as autoencoder:
            features = (autoencoder.encode(images.to(self.device) / 2)[1] for images in batches)
            return torch.cat([autoencoder.quantise(e).to("cpu", dtype) for e in features])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Takes one step of the current stage.

        Stage two uses only the size of the batch: it takes that many cached codes, in the order drawn for the epoch.
        """
        self.zero_grad()
        if self._shown is None:  # no validation images
            self._shown = batch[:SHOWN_IMAGES]
        if self._in_stage_two:
            assert self._codes is not None
            rows = self._order[batch_idx * len(batch) : (batch_idx + 1) * len(batch)]
            loss = self._denoising_loss(self._codes[rows].to(self.device).long())
        else:
            reconstruction = self.autoencoder(batch / 2)
            loss = self._autoencoder_loss(reconstruction, batch)
            self._usage += reconstruction.indices.flatten().bincount(minlength=self.num_codes)
        self.manual_backward(loss)
        part = int(self._in_stage_two)
        optimizer = cast(list[Any], self.optimizers())[part]
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer.optimizer, self.gradient_clip_val, "norm")
        optimizer.step()
        if self._lr_scheduler is not None:
            cast(list[Any], self.lr_schedulers())[part].step()
        stage = 2.0 if self._in_stage_two else 1.0
        self.log_dict({"train/loss": loss, "train/stage": stage}, prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss

    def on_train_epoch_end(self) -> None:
        """Logs the use of the codebook."""
        if not self._in_stage_two:
            self._usage = cast(Tensor, self.trainer.strategy.reduce(self._usage, reduce_op="sum"))
            self._warn_of_collapse()
        self.log("codebook/perplexity", perplexity(self._usage))
        self.log("codebook/dead_codes", float((self._usage == 0).sum()))

    def _warn_of_collapse(self) -> None:
        """Warns once if hardly any codes are in use."""
        used = int((self._usage > 0).sum())
        if used < max(2, COLLAPSED * self.num_codes) and not self._collapse_reported:
            self._collapse_reported = True
            warnings.warn(
                f"codebook collapse: {used} of {self.num_codes} codes are in use in epoch {self.current_epoch}, "
                f"perplexity {perplexity(self._usage):.1f}; images are distinguished by only these. If this persists, "
                "use fewer --model.num_codes, a smaller learning rate or another seed",
                stacklevel=2,
            )

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the sum of both stages' losses; before stage two the denoiser's loss is that of uniform logits.

        It therefore decreases throughout training, and the lowest value marks the best checkpoint.
        """
        reconstruction = self.autoencoder(images / 2)
        return self._autoencoder_loss(reconstruction, images) + self._denoising_loss(reconstruction.indices, generator)

    def _autoencoder_loss(self, reconstruction: Reconstruction, images: Tensor) -> Tensor:
        """Equilibrium loss of the quantiser, plus the images' mean squared error over their variance."""
        assert self.data_variance is not None
        return equilibrium_loss(reconstruction) + F.mse_loss(reconstruction.images, images / 2) / self.data_variance

    def _denoising_loss(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the loss of codes `(B, h, w)`, each image at a uniform random step."""
        steps = self.num_train_timesteps
        t = torch.randint(1, steps + 1, (len(codes),), generator=generator, device=codes.device)
        masked = torch.rand(codes.shape, generator=generator, device=codes.device) < (t / steps)[:, None, None]
        if self._in_stage_two:
            logits = self.denoiser(codes.masked_fill(masked, self.mask_id), t)
        else:
            logits = torch.zeros(len(codes), self.num_codes, *codes.shape[1:], device=codes.device)
        return denoising_loss(logits, codes, masked, t, steps, self.objective)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs the loss, and keeps the first images for the figure of reconstructions."""
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self._shown = batch[:SHOWN_IMAGES]

    # Sampling

    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields the decoded images `(B, C, H, W)` after each step; masked tokens are decoded as zero vectors."""
        for tokens, masked in self._unmask(seeds, image_shape):
            yield self._decode(tokens, masked)

    @torch.no_grad()
    def sample(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Returns one image per seed, `(B, C, H, W)` in [-1, 1]; only the final tokens are decoded."""
        return self._decode(*deque(self._unmask(seeds, image_shape), maxlen=1)[0])

    def _unmask(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        channels, height, width = image_shape
        if channels != self.autoencoder.in_channels or height % REDUCTION or width % REDUCTION:
            raise ValueError(
                f"images of shape {image_shape} cannot be divided into a grid of codes; give "
                f"{self.autoencoder.in_channels} channels (--model.in_channels) and sides that are multiples of "
                f"{REDUCTION} (--data.image_size)"
            )
        shape = (height // REDUCTION, width // REDUCTION)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        uniforms = (
            self._to_device(torch.stack([torch.rand(2, *shape, generator=generator) for generator in generators]))
            for _ in range(self.num_inference_steps)
        )
        masked = torch.ones(len(seeds), *shape, dtype=torch.bool, device=self.device)
        return unmask(self.denoiser, masked, uniforms, self.num_inference_steps, self.mask_id, self.temperature)

    def _to_device(self, x: Tensor) -> Tensor:
        """Copies a tensor to the system's device without GPU synchronisation."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _decode(self, tokens: Tensor, masked: Tensor) -> Tensor:
        codes = self.autoencoder.lookup(tokens.masked_fill(masked, 0)) * ~masked[:, None]
        return (2 * self.autoencoder.decode(codes)[1]).clamp(-1, 1)

    # Testing

    def on_test_start(self) -> None:
        """Warns if the denoiser is untrained."""
        if not self.generates:
            warnings.warn(
                "this checkpoint is of stage one: its reconstructions are meaningful, its samples come from an "
                "untrained denoiser; train stage two with `fit` from this checkpoint",
                stacklevel=2,
            )

    def reconstruction_metrics(self, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """Compares images with their reconstructions: mean and standard error over the images.

        Args:
            batches: Images `(B, C, H, W)` in [-1, 1]; they are padded with black, and their reconstructions cropped, if
                the method is trained on larger images.

        Returns:
            `reconstruction_mse` and `reconstruction_ssim` (11x11 Gaussian window of torchmetrics) of pixels in [0, 1];
            and, as released, of outputs before clipping, `reconstruction_mse_released` and
            `reconstruction_dssim_released`: 1 - SSIM of images in [-0.5, 0.5], padded with zeros.
        """
        values: dict[str, list[Tensor]] = defaultdict(list)
        side = self._image_shape[-1]
        for batch in batches:
            images, pad = batch.to(self.device), (side - batch.shape[-1]) // 2
            raw = self._reconstruct(F.pad(images, [pad] * 4, value=-1), clip=False)
            raw = raw[..., pad : side - pad, pad : side - pad]
            ours, theirs = (raw.clamp(-1, 1) + 1) / 2, (images + 1) / 2
            values["reconstruction_mse"].append(_mean_square(ours - theirs))
            values["reconstruction_ssim"].append(_similarity(ours, theirs))
            values["reconstruction_mse_released"].append(_mean_square((raw - images) / 2))
            values["reconstruction_dssim_released"].append(1 - _similarity(raw / 2, images / 2, zero_edge=True))
        joined = {key: torch.cat(parts).double() for key, parts in values.items()}
        return {key: (float(v.mean()), float(v.std() / len(v) ** 0.5)) for key, v in joined.items()}

    # Pictures and checkpoints

    def figures(self) -> dict[str, Figure]:
        """Plots the use of each code, and images above their reconstructions."""
        figures = {"codebook": plot_usage(self._usage.cpu())} if self._usage.sum() else {}
        if self._shown is not None:
            figures["reconstructions"] = plot_reconstructions(self._shown.cpu(), self._reconstruct(self._shown).cpu())
        return figures

    @torch.no_grad()
    def _reconstruct(self, images: Tensor, clip: bool = True) -> Tensor:
        """Returns the reconstructions of images `(B, C, H, W)` in [-1, 1], computed in evaluation mode."""
        with _evaluating(self.autoencoder):
            images = 2 * self.autoencoder(images / 2).images
        return images.clamp(-1, 1) if clip else images

    @property
    def process(self) -> dict[str, int]:
        """Options fixed by training: number of diffusion steps and index of the mask."""
        return {"num_train_timesteps": self.num_train_timesteps, "mask_id": self.mask_id}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["in_stage_two"] = self._in_stage_two

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint of another method, network or diffusion process; restores its stage."""
        super().on_load_checkpoint(checkpoint)
        self._in_stage_two = checkpoint.get("in_stage_two", True)


def _mean_square(errors: Tensor) -> Tensor:
    """Mean square of each image's errors, `(B, C, H, W)` to `(B,)`."""
    return errors.square().flatten(1).mean(1)


def _similarity(ours: Tensor, theirs: Tensor, zero_edge: bool = False) -> Tensor:
    """Structural similarity `(B,)` of image pairs `(B, C, H, W)` with a range of 1; mirror or zero padding."""
    edge = SSIM_WINDOW // 2 if zero_edge else 0
    a, b = (F.pad(x, [edge] * 4) for x in (ours, theirs))
    _, similarity = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    height, width = ours.shape[-2:]
    return similarity[..., edge : edge + height, edge : edge + width].flatten(1).mean(1)


@contextmanager
def _evaluating(network: VQSVAE) -> Iterator[VQSVAE]:
    """Keeps a network in evaluation mode within the context."""
    training = network.training
    network.eval()
    try:
        yield network
    finally:
        network.train(training)


def _in_order(loader: DataLoader[Tensor]) -> DataLoader[Tensor]:
    """Returns a loader of all images of a loader, unshuffled."""
    return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)


def _variance(batches: Iterable[Tensor]) -> float:
    """Unbiased variance of all pixels of images in [-1, 1], mapped to [0, 1]."""
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        pixels = (batch.double() + 1) / 2
        count += pixels.numel()
        total += float(pixels.sum())
        squares += float(pixels.square().sum())
    return (squares - total**2 / count) / (count - 1)


def read_official(
    autoencoder: Mapping[str, Tensor], denoiser: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Renames the tensors of the two released files to those of the method's network.

    Args:
        autoencoder: State dict of stage one (`model.pth`).
        denoiser: State dict of stage two (`diff_result/diff_model.pth`).

    Returns:
        The network's state dict, and its size as arguments of the system.

    Raises:
        KeyError: If they are not such state dicts; names the first missing tensor.
        CheckpointMismatchError: If tensors are unexpected, missing or of another shape; lists them.
    """
    arguments: dict[str, Any] = {
        "in_channels": autoencoder["encoder.snn_convs.0.weight"].shape[1],
        "num_codes": autoencoder["vq_layer.embeddings.weight"].shape[0],
        "code_channels": autoencoder["vq_layer.embeddings.weight"].shape[1],
        "autoencoder_channels": autoencoder["encoder.snn_convs.0.weight"].shape[0],
        "base_channels": denoiser["conv1.0.weight"].shape[0],
        "num_steps": len(autoencoder["memout.coef"]),
    }
    constant = ("memout.coef", "vq_layer.memout.coef")  # powers of the membrane decay, constant
    renamed = {f"autoencoder.{_rename(k)}": v for k, v in autoencoder.items() if k not in constant}
    renamed |= {f"denoiser.{_rename(k)}": v for k, v in denoiser.items()}
    with torch.device("meta"):
        network = SpikingDiffusion(**arguments).network
    check_state(renamed, network, "the official checkpoint")
    return renamed, arguments


def _rename(key: str) -> str:
    """Converts a released tensor name to ours; three released modules form one `SpikingConv`."""
    for theirs, ours in (
        ("decoder.snn_convs.6.", "output."),
        ("vq_layer.embeddings.", "codebook."),
        ("vq_layer.poisson.", "generator."),
        ("vq_layer.", ""),
        ("conv6.0.", "head."),
    ):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    key = re.sub(r"snn_convs\.(\d+)", lambda m: f"{int(m[1]) // 3}.{int(m[1]) % 3}", key)
    return re.sub(r"^conv(\d+)\.", lambda m: f"layers.{int(m[1]) - 1}.", key)
