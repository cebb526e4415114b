"""`python -m benchmark estimate-gamma`: adds Analytic-DPM's Gamma, estimated on training images, to a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from rich.progress import track

from benchmark.runs import gamma_path
from datamodules import ImageDataModule
from systems.base import DiffusionSystem
from systems.checkpoints import read_trained, save_checkpoint, with_training_data
from systems.diffusion.analytic_dpm import estimate_gamma
from systems.diffusion.gaussian import GaussianDiffusion


class BenchmarkTrainer(Trainer):
    """Lightning's trainer with the stage `estimate_gamma` and a run folder that no logger determines."""

    run_folder: Path | None = None
    """Folder of everything that a stage writes; without one, Lightning's rules apply."""

    @property
    def log_dir(self) -> str | None:
        """The run folder, the same in all processes; all of them must ask for it."""
        if self.run_folder is None:
            return super().log_dir
        folder: str = self.strategy.broadcast(str(self.run_folder))
        return folder

    def estimate_gamma(
        self,
        model: DiffusionSystem,
        datamodule: ImageDataModule,
        ckpt_path: str,
        weights_only: bool | None = None,
        num_images: int | None = 1000,
    ) -> None:
        """Estimates `Gamma_t = E |eps_t|^2 / d` of AnalyticDPMScheduler and adds it to a copy of the checkpoint.

        The network is evaluated once per image and diffusion step.

        Args:
            model: A Gaussian method.
            datamodule: Source of the training images.
            ckpt_path: Checkpoint to read; best or last of the newest run, or a file.
            weights_only: Unused, since code in a checkpoint is never run; Lightning writes it to every config.yaml.
            num_images: Number of training images; null uses all of them, as the paper does.

        Raises:
            ValueError: If the method is not a Gaussian diffusion, or there are fewer training images.
        """
        if not isinstance(model, GaussianDiffusion):
            raise ValueError(
                f"{type(model).__name__} is not a Gaussian diffusion of pixels, which estimate-gamma needs"
            )
        checkpoint = read_trained(ckpt_path, model.method)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        model.to(self.strategy.root_device).eval()
        images = _training_images(datamodule, num_images).to(model.device)
        num_images = len(images)
        show = partial(track, description=f"{num_images:,} images at every step")
        gamma = estimate_gamma(model.network, model.scheduler, images, datamodule.sample_batch_size, progress=show)
        checkpoint["gamma"] = {"values": gamma, "num_images": num_images} | model.gamma_conditions
        checkpoint["training_data"] = with_training_data(model.training_data, datamodule.training_data)
        path = gamma_path(Path(ckpt_path))
        save_checkpoint(checkpoint, path)
        shown = ", ".join(
            f"{float(gamma[t]):.3f} at t={t}" for t in (0, len(gamma) // 10, len(gamma) // 2, len(gamma) - 1)
        )
        print(f"Gamma from {num_images:,} images: {shown}\nin {path}, a copy of the checkpoint, which `test` now uses:")
        print("  python -m benchmark test --model.scheduler AnalyticDPMScheduler --model.num_inference_steps 50")


def _training_images(datamodule: ImageDataModule, count: int | None) -> torch.Tensor:
    """Returns the first images of a shuffled pass over the training images, `(count, C, H, W)` in [-1, 1]."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader: Any = datamodule.train_dataloader()
    order = list(loader.sampler)
    if count is not None and not 1 <= count <= len(order):
        raise ValueError(f"num_images={count}; give a number from 1 to the {len(order)} training images, or null")
    return cast(torch.Tensor, loader.dataset.__getitems__(order[:count]))
