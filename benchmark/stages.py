"""`fit`, `validate`, `test`, `predict` and `estimate-gamma`: a thin LightningCLI over systems and datamodules."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (  # noqa: F401 (short class names)
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint  # noqa: F401
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger  # noqa: F401
from lightning.pytorch.strategies import DDPStrategy

from benchmark.callbacks.checkpointing import (
    AtomicCheckpointIO,
    BestCheckpoint,
    DivergenceGuard,
    LastCheckpoint,
    SaveFitConfig,
)
from benchmark.callbacks.monitor import ImageProgressBar, ProgressLines, TrainingMonitor
from benchmark.callbacks.png import PNGWriter
from benchmark.callbacks.resume import CPUTime, Resume
from benchmark.command_line import Parser, complete_loggers, fill_in_newest_run
from benchmark.configs import design_of, locate_configs
from benchmark.runs import RUNS, new_run, portable, run_of, training_seed
from benchmark.trainer import BenchmarkTrainer
from datamodules import ImageDataModule
from datamodules.own import OwnImages
from datamodules.registry import data_module
from leaderboard.evaluation.callback import Evaluation
from leaderboard.record.records import check_name
from systems.base import DiffusionSystem

PREDICTED = 64
"""Images of `predict` unless the configuration has a number."""

for message in (
    ".*does not have many workers.*",
    ".*LightningCLI's args parameter is intended.*",  # main() fills in the newest run
    ".*loading a checkpoint outside the 'fit' stage.*",  # the state_dict has the averaged weights
    ".*Total length of `list` across ranks is zero.*",  # without validation images
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning calls torch
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*your dataloader is not resumable.*",  # the sampler is: datamodules.loading.TrainingOrder
    ".*algorithm_type.* is deprecated.*",  # DPM-Solver with noise prediction, as in the papers
    ".*smaller than the logging interval.*",  # steps are counted across epochs
    ".*callbacks used to create the checkpoint need to be provided.*",  # of training only
):
    warnings.filterwarnings("ignore", message)
diffusers.utils.logging.set_verbosity_error()  # silences the lower orders at the end of a chain

SMALLEST = {
    "min_epochs": -1,
    "min_steps": -1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
}
"""Smallest values of the trainer's options that Lightning does not check itself."""
WITHOUT_LOGGER = ("predict", "estimate_gamma")
"""Stages that have nothing to log."""
BANNERS = (
    "GPU available: ",  # the first line of `fit` names the device
    "TPU available: ",
    "Seed set to ",  # in config.yaml and the record
    "💡 Tip: ",
    "Restoring states from ",  # the first line of a stage names the checkpoint
    "Restored all states ",
    "Loaded model weights ",
    "`Trainer.fit` stopped: `max_",  # as configured
    "No CUDA runtime is found",  # the compiler looks for it even on the CPU
)
"""Prefixes of log messages that are not printed."""


def is_printed(message: logging.LogRecord) -> bool:
    """Whether a log message is printed."""
    return not message.getMessage().startswith(BANNERS)


for name in ("lightning.pytorch", "lightning.fabric", "torch"):
    for handler in logging.getLogger(name).handlers:
        handler.addFilter(is_printed)


def fastest_precision(accelerator: str | Accelerator) -> str:
    """Returns `bf16-mixed` where the hardware computes in bfloat16, else `32-true`.

    Spikes are exact in bfloat16; potentials, losses and weights stay in float32.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = accelerator in ("auto", "cpu") and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return "bf16-mixed" if native else "32-true"


def check_numbers(trainer: Mapping[str, Any]) -> None:
    """Refuses numbers of the trainer with which Lightning would fail later, or do something else.

    Raises:
        ValueError: If one is too small.
    """
    for name, smallest in SMALLEST.items():
        value = trainer.get(name)
        if isinstance(value, int | float) and value < smallest:
            raise ValueError(f"--trainer.{name}={value}; give {smallest} or more")
    if trainer.get("val_check_interval") == 0:
        raise ValueError("--trainer.val_check_interval=0; give 1 or more batches, or a part of an epoch above 0.0")
    devices, accelerator = str(trainer.get("devices")), trainer.get("accelerator")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and devices.lstrip("-").isdigit() and int(devices) < 1:
        raise ValueError(f"--trainer.devices={devices} on the CPU; give a number of processes, 1 or more")


class BenchmarkCLI(LightningCLI):
    """LightningCLI with run folders and the suite's callbacks, each under its own key so that no config drops it."""

    def __init__(self, *classes: Any, **options: Any) -> None:
        """Runs the stage that the first of `args` names."""
        self._stage = options["args"][0]
        super().__init__(*classes, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Returns the stage that was asked for, since the parser of each takes a sixth of a second to build."""
        stages = {**super().subcommands(), "estimate_gamma": {"model", "datamodule"}}
        return {self._stage: stages[self._stage]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `checkpoint`, `last`, `monitor`, `evaluation` and `png`."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(PNGWriter, "png")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best-{step}",
                "checkpoint.enable_version_counter": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Ignores options in the checkpoint: those of a run are in its config.yaml, and typed options win."""

    def before_instantiate_classes(self) -> None:
        """Chooses precision and number of classes if not given, and the run folder: the checkpoint's or a new one."""
        config = self.config[self.subcommand]
        check_numbers(config.trainer)
        config.trainer.precision = config.trainer.precision or fastest_precision(config.trainer.accelerator)
        options: Any = config.model.get("init_args") or {}
        if "num_classes" in options and options.num_classes is None:
            options.num_classes = _number_of_classes(config.data.class_path)
        folder = Path(config.trainer.default_root_dir or RUNS)
        checkpoint = Path(config.ckpt_path) if config.get("ckpt_path") else None
        if config.checkpoint.dirpath is not None:
            config.checkpoint.enable_version_counter = True  # the folder may contain checkpoints of other runs
        elsewhere = None if self.subcommand == "fit" else checkpoint
        run = run_of(checkpoint) if checkpoint else None
        self.run_folder = run or new_run(
            folder, _class_name(config.data.class_path), _class_name(config.model.class_path), elsewhere
        )
        if self.subcommand == "predict":
            config.return_predictions = False  # PNGWriter writes them to disk batch by batch
        if self.subcommand == "fit" and config.evaluation.design is None:
            files = [Path(str(file)) for file in config.get("config") or [] if file is not None]
            config.evaluation.design = next(filter(None, map(design_of, files)), None)
        dump = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, format="json")
        self.resolved = json.loads(dump, parse_constant=str)[
            self.subcommand
        ]  # a solver has -Infinity, which is not JSON
        if self.subcommand != "fit":
            self.resolved["seed_everything"] = training_seed(checkpoint) if checkpoint else None
        if config.evaluation.draft and self.subcommand != "test":
            raise ValueError("--draft is an option of `test`, which measures images; omit it here")

    def instantiate_classes(self) -> None:
        """Lets loggers whose `save_dir` is empty write to the run folder, which the saved config does not contain."""
        saved, self.config = self.config, self.config.clone()
        loggers = [logger for logger in _as_list(self.config[self.subcommand].trainer.logger) if logger is not True]
        for logger in loggers if self.subcommand not in WITHOUT_LOGGER else ():
            if logger and logger.get("init_args") and logger.init_args.get("save_dir") == "":
                logger.init_args.save_dir = str(self.run_folder)
                if logger.class_path.endswith(TensorBoardLogger.__name__):
                    logger.init_args.name = logger.init_args.version = ""
        self._saved_config = saved
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds TensorBoard, the progress bar, atomic checkpoints and the divergence guard."""
        self.config = self._saved_config
        config = self.config[self.subcommand].trainer
        if self.subcommand in WITHOUT_LOGGER:
            kwargs["logger"] = False
        elif config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_folder, name="", version="", default_hp_metric=False)
        kwargs["plugins"] = [*_as_list(self.config_init[self.subcommand].trainer.plugins), AtomicCheckpointIO()]
        self.trainer_defaults["callbacks"] = [DivergenceGuard(), Resume(), CPUTime()]
        if kwargs.get("logger", config.logger):
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        if config.enable_progress_bar is not False:
            drawn = config.enable_progress_bar or sys.stdout.isatty()
            self.trainer_defaults["callbacks"].append(ImageProgressBar() if drawn else ProgressLines())
        kwargs["enable_model_summary"] = config.enable_model_summary or False
        trainer = super().instantiate_trainer(**kwargs)
        trainer.run_folder = self.run_folder  # type: ignore[attr-defined]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_folder / "checkpoints")
        if config.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            raise ValueError(
                "--trainer.sync_batchnorm true needs GPUs, since torch does not synchronise BatchNorm on the CPU; omit "
                "it (each process then normalises by its own images) or give --trainer.accelerator gpu"
            )
        if isinstance(trainer.strategy, DDPStrategy) and self.model.trains_in_parts:
            trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the stage."""
        with self.without_remains():
            super()._run_subcommand(subcommand)

    @contextmanager
    def without_remains(self) -> Iterator[None]:
        """Removes the run folder if this command fails after it created it but before it had any result."""
        is_new = not self.run_folder.exists()
        try:
            yield
        except Exception:
            results = (self.run_folder / name for name in ("checkpoints", "evaluation", "records", "plots"))
            if is_new and not self.trainer.global_step and not any(path.exists() for path in results):
                shutil.rmtree(self.run_folder, ignore_errors=True)
            raise

    def after_instantiate_classes(self) -> None:
        """Passes the config on to the record, and refuses a test that deviates from its protocol before it starts."""
        self.model.check_contract()
        check_name("method", self.model.method)
        self.model.configuration = portable(self.resolved)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                callback.config = self.resolved
                if self.subcommand == "test":
                    callback.check(self.datamodule)
        if self.subcommand == "predict":
            self.datamodule.num_samples = self.datamodule.num_samples or PREDICTED

    def before_fit(self) -> None:
        """Prints run folder, number of parameters, device and precision."""
        if self.trainer.is_global_zero:
            size = _format_count(sum(p.numel() for p in self.model.parameters()))
            device, number = self.trainer.strategy.root_device.type, self.trainer.world_size
            device += f" x {number}" if number > 1 else ""
            print(f"fit in {self.run_folder}: {size} parameters, {device}, {self.trainer.precision}", flush=True)


class DryRun(BenchmarkCLI):
    """Builds and checks trainer, model and data of a stage, but does not run it."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Does nothing."""


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _format_count(count: int) -> str:
    """Formats a count with three digits: 1234567 as `1.23 M`."""
    return f"{count / 1e6:.3g} M" if count >= 999_500 else f"{count / 1e3:.3g} K"


def _number_of_classes(class_path: str) -> int:
    """Returns the number of classes of a dataset, 0 if it has none.

    Raises:
        ValueError: If it is known only from the images.
    """
    kind = data_module(class_path)
    if kind.num_classes is None and (issubclass(kind, OwnImages) or kind.__module__.partition(".")[0] != "datamodules"):
        raise ValueError(
            f"the number of classes of {class_path} is not known before its images are read; give "
            "--model.num_classes N, or 0 for an unconditional model"
        )
    return kind.num_classes or 0


def _class_name(class_path: str) -> str:
    return class_path.rsplit(".", 1)[-1].lower()


def run_stage(args: list[str], cli: type[BenchmarkCLI] = BenchmarkCLI) -> BenchmarkCLI:
    """Runs one stage.

    Args:
        args: The stage and its options; `--draft` is short for `--evaluation.draft true`.
        cli: `BenchmarkCLI`, or `DryRun`, which needs no checkpoint and does not run the stage.

    Returns:
        The CLI with its trainer, model and data, after the stage has run.
    """
    torch.set_float32_matmul_precision("high")
    args = locate_configs(args)
    if "--draft" in args:  # at the end, since a later --config would override it
        args = [*(arg for arg in args if arg != "--draft"), "--evaluation.draft=true"]
    return cli(
        DiffusionSystem,
        ImageDataModule,
        trainer_class=BenchmarkTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # else every copy of the model (EMA) refers to the CLI and its processes
        args=complete_loggers(args if cli is DryRun else fill_in_newest_run([args[0].replace("-", "_"), *args[1:]])),
        parser_class=Parser,
        seed_everything_default=42,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={},
        parser_kwargs={"prog": "python -m benchmark"},
    )
