"""Drives an evaluation while Lightning's `test` loop generates the images, and leaves a record behind."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from leaderboard.cost import CostMeter
from leaderboard.fad import FrechetAutoencoderDistance
from leaderboard.features import load_extractor
from leaderboard.metrics import GenerationMetrics
from leaderboard.pictures import enlargement, grid, save_png
from leaderboard.protocols import OFFLINE_V1, STANDARD_V1, canonical_sha256
from leaderboard.records import Artefact, Code, Dataset, MetricValue, ProtocolEntry, Record, write_record
from leaderboard.table import show_records

PROTOCOLS = {protocol.name: protocol for protocol in (STANDARD_V1, OFFLINE_V1)}
VERSIONS = ("torch", "lightning", "snntorch", "diffusers", "torchmetrics", "torch-fidelity", "datasets", "numpy")


class Evaluation(Callback):
    """Measures the images that `test` generates under a protocol, and writes a record to the run folder.

    The number of images is `--data.num_samples`. Fewer than the protocol asks for, or images compared at another
    resolution than the dataset's own (`--data.fit resize`), make a draft, which never ranks.

    Args:
        protocol: How images are compared; results under different protocols never share a table.
        inception_weights: Local file of the Inception weights, where they cannot be downloaded.
        extractor: File of another small extractor made by `train-extractor`, for offline-v1.
        variant: Name that tells this entry from others of the same method.
        grid_images: Generated images in the saved grid.
        fad_dir: Folder of the published autoencoders (`stat_checkpoints/`, `stats/`): adds both Fréchet autoencoder
            distances, for MNIST and Fashion-MNIST.
    """

    def __init__(
        self,
        protocol: Literal["standard-v1", "offline-v1"] = "standard-v1",
        inception_weights: str | None = None,
        extractor: str | None = None,
        variant: str = "default",
        grid_images: int = 64,
        fad_dir: str | None = None,
    ) -> None:
        self.protocol = PROTOCOLS[protocol]
        self.inception_weights = inception_weights
        self.extractor = extractor
        self.variant = variant
        self.grid_images = grid_images
        self.fad_dir = fad_dir
        self.fad: FrechetAutoencoderDistance | None = None
        self.config: dict[str, Any] = {}
        """Resolved configuration of the command, for the record."""
        self.record: Record | None = None
        """What was measured last."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the reference images and opens the cost meter."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.protocol.is_draft(data.num_samples)  # refuses too many before the work is done
        self._started = time.perf_counter()
        extractor = load_extractor(self.extractor or self.protocol.extractor, data.name, self.inception_weights)
        if note := extractor.foreign_to(data.fingerprint):
            warnings.warn(note, stacklevel=2)
        self.metrics = GenerationMetrics(extractor, self.protocol.metrics_for(data.name), self.protocol, note)
        self.metrics.to(pl_module.device)
        if self.fad_dir is not None:
            groups = self.protocol.jackknife_groups
            self.fad = FrechetAutoencoderDistance(data.name, self.fad_dir, groups, trainer.is_global_zero)
            self.fad.to(pl_module.device)
        total = data.num_reference(self.protocol.reference_split)
        start = 0
        batches = data.reference_batches(self.protocol.reference_split)
        for i, batch in enumerate(track(batches, "reference images", total=None, transient=True)):
            if i % trainer.world_size == trainer.global_rank:
                indices = torch.arange(start, start + len(batch))
                self.metrics.update_reference(batch.to(pl_module.device), indices)
                if self.fad is not None:
                    self.fad.update_reference(batch.to(pl_module.device))
            start += len(batch)
        assert start == total, f"the reference split has {total} images but yielded {start}"
        self._first: list[Tensor] = []
        self._images = 0
        self._sampling_seconds = 0.0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.meter = CostMeter(cast(nn.Module, pl_module.network)).__enter__()

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Starts the clock of a batch."""
        self._batch_started = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measures one batch of generated images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = data.to_uint8(outputs)
        if batch_idx == 0:
            self._first.append(images[: self.grid_images].cpu())  # also waits for the device
        self._sampling_seconds += time.perf_counter() - self._batch_started
        self._images += len(images)
        self.metrics.update_generated(images, batch - data.sample_seed)
        if self.fad is not None:
            self.fad.update_generated(images, batch - data.sample_seed)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the metrics, writes record and grid, and prints the result."""
        self.meter.__exit__(None, None, None)
        metrics = self.metrics.compute() | (self.fad.compute() if self.fad is not None else {})
        if not trainer.is_global_zero:
            return
        metrics |= self._reconstruction(trainer, cast(Any, pl_module))
        folder = Path(trainer.log_dir or ".")
        self.record = record = self._record(trainer, pl_module, metrics)
        path = write_record(record, folder / "records")
        grid_path = self._save_grid(folder / "samples" / f"{path.stem}.png")
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.log_metrics({f"test/{k}": v.value for k, v in metrics.items()}, trainer.global_step)
        console = Console()
        show_records([(path, record)], console)
        for line in (
            f"record:      {path}",
            f"samples:     {grid_path}",
            f"tensorboard: tensorboard --logdir {folder}",
        ):
            console.print(line, soft_wrap=True, highlight=False)

    def _reconstruction(self, trainer: Trainer, system: Any) -> dict[str, MetricValue]:
        """Measures a method's autoencoder on the test split, after the meter of generation is closed."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = (batch.float() / 127.5 - 1 for batch in data.reference_batches("test"))
        note = f"of the {data.num_reference('test'):,} test images, none generated"
        measured: dict[str, tuple[float, float]] = system.reconstruction_metrics(images)
        return {key: MetricValue(value, error, 0, note) for key, (value, error) in measured.items()}

    def _save_grid(self, path: Path) -> Path:
        images = torch.cat(self._first)
        save_png(grid(images, columns=8, scale=enlargement(images.shape[-1])), path)
        return path

    def _record(self, trainer: Trainer, system: Any, metrics: Any) -> Record:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        num_images = data.num_samples
        device = system.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        rate = num_images / self._sampling_seconds
        description = self.protocol.description()
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        return Record(
            method=system.method,
            variant=self.variant,
            dataset=Dataset(data.name, data.fingerprint, data.source),
            protocol=ProtocolEntry(self.protocol.name, description, canonical_sha256(description)),
            draft=self.protocol.is_draft(num_images) or not data.is_native,
            config=self.config,
            config_sha256=canonical_sha256(self.config),
            code=code_version(),
            seeds={"training": self.config.get("seed_everything") or 0, "sampling": data.sample_seed},
            checkpoint=Artefact(checkpoint.name, _sha256(checkpoint)) if checkpoint else None,
            extractor=Artefact(self.metrics.extractor.name, self.metrics.extractor.sha256),
            hardware=hardware(device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_time_seconds=time.perf_counter() - self._started,
            metrics=metrics,
            solver=system.solver,
            nfe=system.nfe,
            num_steps=system.num_steps,
            cost=self.meter.result(self._images, system.nfe, rate, peak),
        )


def code_version() -> Code:
    """Returns versions, and commit and state of the checkout that the code lies in."""
    root = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    versions = {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    return Code(commit, None if commit is None or status is None else bool(status), versions)


def hardware(device: torch.device) -> str:
    """Names the device and the host's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
