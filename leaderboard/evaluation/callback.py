"""Drives an evaluation while Lightning's `test` loop generates the images, and leaves a record behind."""

from __future__ import annotations

import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from datamodules.loading import to_bytes
from leaderboard.evaluation.chunks import Chunks, Share, generation_key
from leaderboard.evaluation.cost import CostMeter
from leaderboard.evaluation.reference import build_parts, prepare_reference
from leaderboard.files import canonical_sha256, file_sha256
from leaderboard.metrics.fad import FrechetAutoencoderDistance
from leaderboard.metrics.generation import GenerationMetrics
from leaderboard.pictures import enlargement, grid, save_png
from leaderboard.protocols import INCEPTION, PROTOCOLS, SUITE, TORCHVISION, ProtocolName
from leaderboard.record.entries import Entry
from leaderboard.record.records import (
    Artefact,
    Code,
    Dataset,
    MetricValue,
    ProtocolEntry,
    Record,
    check_name,
    record_name,
    redact_paths,
    write_record,
)
from leaderboard.reports.table import show_result
from leaderboard.reports.terminal import SHORT, terminal

VERSIONS = ("torch", "lightning", "snntorch", "diffusers", "torchmetrics", "torch-fidelity", "datasets", "numpy")


class Evaluation(Callback):
    """Measures the images that `test` generates under a protocol, and writes a record to the run folder.

    The number of images is the protocol's, or `--data.num_samples`. What the protocol does not provide for, such as
    fewer images or another resolution, is an error, and with `--draft` a draft, which never ranks.

    Args:
        protocol: How images are compared; results under different protocols never share a table.
        draft: Whether this is a draft, which may depart from the protocol and never ranks; `--draft` for short.
        inception_weights: Local file of the 2015 Inception weights, where they cannot be downloaded.
        torchvision_weights: Local file of torchvision's Inception weights, for paper-spiking-diffusion.
        extractor: File of another small extractor made by `train-extractor`, for offline-v1.
        variant: Name that tells this entry from others of the same method.
        grid_images: Generated images in the saved grid.
        fad_dir: Folder of the published autoencoders (`stat_checkpoints/`, `stats/`): adds the protocol's Fréchet
            autoencoder distance, for MNIST, Fashion-MNIST, CIFAR-10 and CelebA (`leaderboard/metrics/fad.py` says where
            them).
        keep_samples: Keeps the generated images under `evaluation/` in the run folder, so that a test of the same
            model under another protocol does not generate them again; else they go when the record is written.
    """

    def __init__(
        self,
        protocol: ProtocolName = "standard-v1",
        draft: bool = False,
        inception_weights: str | None = None,
        torchvision_weights: str | None = None,
        extractor: str | None = None,
        variant: str = "default",
        grid_images: int = 64,
        fad_dir: str | None = None,
        keep_samples: bool = False,
    ) -> None:
        check_name("variant", variant, required=False)
        self.protocol = PROTOCOLS[protocol]
        self.draft = draft
        self.inception_weights = inception_weights
        self.torchvision_weights = torchvision_weights
        self.extractor = extractor
        self.variant = variant
        self.grid_images = grid_images
        self.fad_dir = fad_dir
        self.keep_samples = keep_samples
        self.config: dict[str, Any] = {}
        """Resolved configuration of the command, for the record."""
        self.record: Record | None = None
        """What was measured last."""

    def check(self, data: Any) -> None:
        """Refuses a run that is not the protocol, before anything is loaded, unless it is a draft.

        Args:
            data: Data module; where the number of images was not given, it takes the protocol's.

        Raises:
            ValueError: If it departs from the protocol in any way.
        """
        data.num_samples = data.num_samples or self.protocol.num_samples
        departures = self.protocol.departures(
            data.name, data.native_size, data.compared_size, data.num_samples, data.sample_seed
        )
        extractors = {view.extractor: view.weights for view in self.protocol.views}
        if self.extractor is not None and SUITE not in extractors:
            raise ValueError(f"{self.protocol.name} has its own extractor; leave out --evaluation.extractor")
        for extractor, file in ((INCEPTION, self.inception_weights), (TORCHVISION, self.torchvision_weights)):
            if extractor in extractors and file is not None and Path(file).is_file():
                found = file_sha256(Path(file))
                if not found.startswith(extractors[extractor]):
                    departures.append(
                        f"its weights of {extractor} have the SHA-256 {extractors[extractor]}..., not {found[:8]}..."
                    )
        if departures and not self.draft:
            raise ValueError(
                f"this is not the protocol {self.protocol.name!r}: {'; '.join(departures)}. Follow it, or add --draft "
                "for a draft, which never ranks"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the run before the loaders of images to generate are made."""
        if stage == "test":
            self.check(trainer.datamodule)  # type: ignore[attr-defined]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the reference images and opens the cost meter."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._started = time.perf_counter()
        weights = (self.inception_weights, self.torchvision_weights, self.extractor)
        self.parts = build_parts(self.protocol, data, weights, self.fad_dir, trainer.is_global_zero)
        for part in self.parts:
            part.to(pl_module.device)
        where = (pl_module.device, trainer.global_rank, trainer.world_size)
        prepare_reference(self.parts, data, self.protocol, *where, trainer.strategy.broadcast)
        self._first: list[Tensor] = []
        self._total = Share()
        self._folder = Path(trainer.log_dir or ".")  # asks all processes
        self._chunks = self._open_chunks(trainer, pl_module)
        self.meter = CostMeter(cast(nn.Module, pl_module.network)).__enter__()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Looks for the images of an interrupted test, and starts the clock of a batch."""
        first = int(batch[0]) - trainer.datamodule.sample_seed  # type: ignore[attr-defined]
        self._found = None if self._chunks is None else self._chunks.read(first, len(batch))
        cast(Any, pl_module).is_generated = self._found is not None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
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
        indices = batch - data.sample_seed
        images, pixels, share = self._found or self._finish(data.compared(outputs), int(indices[0]))
        if batch_idx == 0:
            self._first.append(images[: self.grid_images])
        self._total += share
        for part in self.parts:
            seen = images if isinstance(part, FrechetAutoencoderDistance) else pixels
            part.update_generated(seen.to(pl_module.device), indices)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the metrics, writes record and grid, and prints the result."""
        self.meter.__exit__(None, None, None)
        cast(Any, pl_module).is_generated = False
        self._total = self._total.over_processes()
        metrics = {key: value for part in self.parts for key, value in part.compute().items()}
        if not trainer.is_global_zero:
            return
        metrics |= self._reconstruction(trainer, cast(Any, pl_module))
        folder = self._folder
        self.record = record = redact_paths(self._record(trainer, pl_module, metrics))
        self._save_grid((folder / "samples" / record_name(record)).with_suffix(".png"))
        path = write_record(record, folder / "records")  # last: where there is a record, nothing is missing
        if self._chunks is not None and not self.keep_samples:
            self._chunks.clear()
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.log_metrics({f"test/{k}": v.value for k, v in metrics.items()}, trainer.global_step)
        show_result(Entry(path, record), terminal(SHORT))

    def _open_chunks(self, trainer: Trainer, system: LightningModule) -> Chunks | None:
        """Returns what an interrupted test of the same left; nothing for a model that no file and options describe."""
        self._checkpoint = None
        if not trainer.ckpt_path:
            return None
        path = Path(trainer.ckpt_path)
        self._checkpoint = Artefact(path.name, file_sha256(path))
        if not self.config:
            return None
        environment = {
            "versions": code_version().versions,
            "hardware": hardware(system.device),
            "precision": [trainer.precision, torch.get_float32_matmul_precision()],
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "quantisation": self.protocol.quantisation,
        }
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        key = generation_key(system, data, self._checkpoint.sha256, self.config.get("model"), environment)
        chunks = Chunks(self._folder / "evaluation" / trainer.strategy.broadcast(key))
        if chunks.count and trainer.is_global_zero:
            print(f"the test goes on from {chunks.count} finished batches in {chunks.folder}")
        return chunks

    def _finish(self, outputs: Tensor, first: int) -> tuple[Tensor, Tensor, Share]:
        """Waits for the images of a batch, and keeps them, as pictures and as compared, with what they took."""
        device, outputs = outputs.device, outputs.cpu()
        seconds = time.perf_counter() - self._batch_started
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        share = Share(len(outputs), seconds, peak, self.meter.take())
        images = to_bytes(outputs)
        pixels = images if self.protocol.quantisation == "round" else quantise(outputs, self.protocol.quantisation)
        if self._chunks is not None:
            self._chunks.write(first, images, pixels, share)
        return images, pixels, share

    def _reconstruction(self, trainer: Trainer, system: Any) -> dict[str, MetricValue]:
        """Measures a method's autoencoder on the test split, after the meter of generation is closed."""
        if not self.protocol.reconstruction:
            return {}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = (batch.float() / 127.5 - 1 for batch in data.reference_batches("test"))
        note = f"of the {data.num_reference('test'):,} test images, none generated"
        measured: dict[str, tuple[float, float]] = system.reconstruction_metrics(images)
        return {key: MetricValue(*measured[key], 0, note) for key in self.protocol.reconstruction if key in measured}

    def _extractor(self) -> Artefact:
        """Names the networks behind the metrics: one with its own hash, several with a hash of theirs."""
        used = {p.extractor.name: p.extractor.sha256 for p in self.parts if isinstance(p, GenerationMetrics)}
        name = " + ".join(used)
        return Artefact(name, used[name] if len(used) == 1 else canonical_sha256(used))

    def _save_grid(self, path: Path) -> None:
        images = torch.cat(self._first)
        save_png(grid(images, columns=8, scale=enlargement(images.shape[-1])), path)

    def _record(self, trainer: Trainer, system: Any, metrics: Any) -> Record:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        total = self._total
        seed = self.config.get("seed_everything")
        description = self.protocol.description()
        return Record(
            method=system.method,
            variant=self.variant,
            dataset=Dataset(data.name, data.fingerprint, data.source),
            protocol=ProtocolEntry(self.protocol.name, description, canonical_sha256(description)),
            draft=self.draft or total.images < self.protocol.num_samples,
            config=self.config,
            config_sha256=canonical_sha256(self.config),
            code=code_version(),
            seeds=({} if seed is None or seed is False else {"training": seed}) | {"sampling": data.sample_seed},
            checkpoint=self._checkpoint,
            extractor=self._extractor(),
            hardware=hardware(system.device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_time_seconds=time.perf_counter() - self._started,
            metrics=metrics,
            solver=system.solver,
            nfe=system.nfe,
            num_steps=system.num_steps,
            cost=total.counts.cost(
                system.network, total.images, system.nfe, total.images / total.seconds, total.peak_memory_bytes
            ),
        )


def quantise(images: Tensor, how: str) -> Tensor:
    """Brings generated images in [-1, 1] to the scale of bytes, as `Protocol.quantisation` says."""
    if how == "round":
        return to_bytes(images)
    pixels = images.float().add(1).mul(127.5)
    return pixels.clamp(0, 255).to(torch.uint8) if how == "truncate" else pixels


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
