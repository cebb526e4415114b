"""`fit`, `validate`, `test` and `predict`: a thin LightningCLI over the systems and datamodules."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
import yaml
from diffusers import (  # noqa: F401 (short class names)
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint  # noqa: F401
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

import datamodules
import systems
from benchmark.estimate import BenchmarkTrainer
from benchmark.faults import DivergenceGuard, LastCheckpoint, WholeCheckpointIO
from benchmark.graphs import TrainingGraphs
from benchmark.messages import plain
from benchmark.monitor import ImageProgressBar, ProgressLines, TrainingMonitor
from benchmark.png import PNGWriter
from benchmark.runs import RUNS, find_checkpoint, new_run, newest_run, run_of, training_seed
from datamodules import ImageDataModule
from leaderboard.evaluation import Evaluation
from leaderboard.records import write_atomic
from systems.analytic_dpm import AnalyticDPMScheduler, StridedDDPMScheduler  # noqa: F401
from systems.base import DiffusionSystem

for message in (
    ".*does not have many workers.*",
    ".*LightningCLI's args parameter is intended.*",  # main() completes the command line
    ".*loading a checkpoint outside the 'fit' stage.*",  # averaged weights are the state_dict, nothing is lost
    ".*Total length of `list` across ranks is zero.*",  # no image is held out
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # between Lightning and torch
    ".*Checkpoint directory .* exists and is not empty.*",  # resumed runs
    ".*your dataloader is not resumable.*",  # its sampler is: datamodules.loading.TrainingOrder
    ".*algorithm_type.* is deprecated.*",  # DPM-Solver of noise prediction, which the papers use
    ".*smaller than the logging interval.*",  # steps are counted across epochs
):
    warnings.filterwarnings("ignore", message)
diffusers.utils.logging.set_verbosity_error()  # orders that a solver lowers at the end of a chain

BANNERS = (
    "GPU available: ",  # the first line of `fit` names the device
    "TPU available: ",
    "Seed set to ",  # in config.yaml and the record
    "💡 Tip: ",
    "Restoring states from ",  # the first line of a stage names the checkpoint
    "Restored all states ",
    "Loaded model weights ",
    "`Trainer.fit` stopped: `max_",  # as configured
    "No CUDA runtime is found",  # the compiler looks for it even for code on the CPU
)
"""Prefixes of log messages that are not printed."""


def is_no_banner(message: logging.LogRecord) -> bool:
    """Returns whether a log message is printed."""
    return not message.getMessage().startswith(BANNERS)


for name in ("lightning.pytorch", "lightning.fabric", "torch"):
    for handler in logging.getLogger(name).handlers:
        handler.addFilter(is_no_banner)


MOST_ALIASES = 20
"""Aliases of a YAML file that are unfolded: nested, 20 can stand for some thousand values, 100 for more than fit."""


class Parser(LightningArgumentParser):
    """Lightning's parser, whose message is one line, and on a mistyped class names the known ones."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with exit code 2."""
        message = plain(message)
        if "import path string" in message and "NestedArg" not in message:
            known = {"model": systems.__all__, "data": datamodules.__all__}
            for key, names in known.items():
                if f'Parser key "{key}"' in message:
                    classes = [n for n in names if n != "ImageDataModule" and not n.endswith("Error")]
                    message += f"\nknown classes of --{key}: {', '.join(classes)}"
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {message}\ntip: `python -m benchmark COMMAND --help` lists every option", file=sys.stderr)
        sys.exit(2)  # without the usage, which is pages long


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the lowest validation loss; none where no image is held out."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for validation images when training starts."""
        if stage == "fit" and not trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            self.monitor, self.save_top_k = None, 0
        super().setup(trainer, pl_module, stage)


class SaveFitConfig(SaveConfigCallback):
    """Keeps the configuration of training in the run folder; later stages leave it as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Waits: what is refused later must not have replaced the configuration of a run that shall go on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves when training starts, whole or not at all."""
        folder = trainer.log_dir  # asks all processes
        if folder is not None and trainer.is_global_zero:
            write_atomic(Path(folder) / self.config_filename, self.parser.dump(self.config, skip_none=False))


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


class BenchmarkCLI(LightningCLI):
    """Adds the suite's callbacks under keys of their own, so that no config can drop them, and the run folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Adds the stage that Lightning's trainer does not have."""
        return {**LightningCLI.subcommands(), "estimate_gamma": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `checkpoint`, `last`, `monitor`, `evaluation`, `png` and `graphs`."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(TrainingMonitor, "monitor")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(PNGWriter, "png")
        parser.add_lightning_class_args(TrainingGraphs, "graphs")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best-{step}",
                "checkpoint.enable_version_counter": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Takes no options from the checkpoint: a run's are in its config.yaml, and what is typed wins."""

    def before_instantiate_classes(self) -> None:
        """Chooses the precision, where none is given, and the run folder: that of the checkpoint, or a new one."""
        config = self.config[self.subcommand]
        config.trainer.precision = config.trainer.precision or fastest_precision(config.trainer.accelerator)
        folder = Path(config.trainer.default_root_dir or RUNS)
        checkpoint = Path(config.ckpt_path) if config.get("ckpt_path") else None
        elsewhere = None if self.subcommand == "fit" else checkpoint
        run = run_of(checkpoint) if checkpoint else None
        self.run_folder = run or new_run(
            folder, _short(config.data.class_path), _short(config.model.class_path), elsewhere
        )
        if self.subcommand == "predict":
            config.return_predictions = False  # written to disk as they come
        dump = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="json")
        self.resolved = json.loads(dump, parse_constant=str)[self.subcommand]  # a solver's -Infinity is no JSON
        if self.subcommand != "fit":
            self.resolved["seed_everything"] = training_seed(run) if run else None
        if config.evaluation.draft and self.subcommand != "test":
            raise ValueError("--draft is an option of `test`, where images are measured; leave it out here")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds TensorBoard, the progress bar and what keeps a training from being lost."""
        config = self.config[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run_folder.parent, name="", version=self.run_folder.name)
        kwargs["plugins"] = [*_listed(self.config_init[self.subcommand].trainer.plugins), WholeCheckpointIO()]
        self.trainer_defaults["callbacks"] = [DivergenceGuard()]
        if config.logger is not False:
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        if config.enable_progress_bar is not False:
            drawn = config.enable_progress_bar or sys.stdout.isatty()
            self.trainer_defaults["callbacks"].append(ImageProgressBar() if drawn else ProgressLines())
        kwargs["enable_model_summary"] = config.enable_model_summary or False
        trainer = super().instantiate_trainer(**kwargs)
        if config.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            raise ValueError(
                "--trainer.sync_batchnorm true needs GPUs: torch synchronises no BatchNorm on the CPU; leave it out "
                "(each process then normalises by its own images) or give --trainer.accelerator gpu"
            )
        if isinstance(trainer.strategy, DDPStrategy) and self.model.trains_in_parts:
            trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Hands the configuration to the record, and refuses a test that departs from its protocol at once."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                callback.config = self.resolved
                if self.subcommand == "test":
                    callback.check(self.datamodule)
                elif self.subcommand == "predict":
                    self.datamodule.num_samples = self.datamodule.num_samples or callback.protocol.num_samples

    def before_fit(self) -> None:
        """Prints what is trained, and where."""
        if self.trainer.is_global_zero:
            size = _rounded(sum(p.numel() for p in self.model.parameters()))
            device, number = self.trainer.strategy.root_device.type, self.trainer.world_size
            device += f" x {number}" if number > 1 else ""
            print(f"fit in {self.run_folder}: {size} parameters, {device}, {self.trainer.precision}", flush=True)


class Rehearsal(BenchmarkCLI):
    """Builds all that a stage needs and checks it, but does not run it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _rounded(count: int) -> str:
    """Shows a count with three digits."""
    return f"{count / 1e6:.3g} M" if count >= 999_500 else f"{count / 1e3:.3g} K"


def _short(class_path: str) -> str:
    return class_path.rsplit(".", 1)[-1].lower()


def complete(args: list[str]) -> list[str]:
    """Adds the newest run's config and checkpoint to a command that names neither.

    A checkpoint of `best` or `last` is one of the newest run. `fit` takes a run's configuration only where it is told
    to go on, by --ckpt_path without --config.

    Raises:
        ValueError: If a config is given without a checkpoint.
        FileNotFoundError: If there is no run, or the checkpoint does not exist.
    """
    stage, rest = args[0], args[1:]
    for option, value in zip(rest, [*rest[1:], ""], strict=False):
        key, _, given = option.partition("=")
        if key in ("--config", "-c"):
            _check_config(Path(given or value))
    if any(a in ("-h", "--help") or a.startswith(("--help=", "--print_config")) for a in rest):
        return args
    typed = {}
    for name in ("--config", "-c", "--ckpt_path", "--trainer.default_root_dir"):
        for i, arg in enumerate(rest):
            if arg == name and i + 1 < len(rest):
                typed[name] = rest[i + 1]
            elif arg.startswith(f"{name}="):
                typed[name] = arg.split("=", 1)[1]
    checkpoint = typed.get("--ckpt_path")
    has_config = "--config" in typed or "-c" in typed
    if stage == "fit" and checkpoint is None:
        return args
    if has_config and checkpoint is None:
        raise ValueError(
            f"`{stage} --config` needs a checkpoint: add `--ckpt_path CHECKPOINT`, or leave out --config to take the "
            "newest run"
        )
    folder = Path(typed.get("--trainer.default_root_dir", RUNS))
    if has_config:
        if checkpoint in ("best", "last"):
            path = find_checkpoint(newest_run(folder), checkpoint)
            print(f"{stage} of {path}")
            return [*args, "--ckpt_path", str(path)]
        if not Path(str(checkpoint)).is_file():
            raise FileNotFoundError(f"--ckpt_path {checkpoint} is not a file; give a checkpoint (*.ckpt), best or last")
        return args
    if checkpoint in (None, "best", "last"):
        run = newest_run(folder)
        path = find_checkpoint(run, checkpoint or "last")
    else:
        path = Path(str(checkpoint))
        if not path.is_file():
            raise FileNotFoundError(f"--ckpt_path {path} is not a file; give a checkpoint (*.ckpt), best or last")
        found = run_of(path)
        if found is None:
            raise ValueError(f"--ckpt_path {path} lies in no run folder; name its configuration too: `--config CONFIG`")
        run = found
    rest = [
        a for i, a in enumerate(rest) if not a.startswith("--ckpt_path") and (i == 0 or rest[i - 1] != "--ckpt_path")
    ]
    _check_config(run / "config.yaml")
    print(f"{stage} of {path}")
    return [stage, "--config", str(run / "config.yaml"), *rest, "--ckpt_path", str(path)]


def _check_config(path: Path) -> None:
    """Looks at what the parser would choke on; what is wrong otherwise, it says itself.

    Raises:
        ValueError: If a configuration is no text or no YAML, or has aliases that may unfold to any size.
    """
    try:
        text = path.read_text(encoding="utf-8")
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    except UnicodeDecodeError:
        raise ValueError(f"--config {path} is no text in UTF-8; give a YAML file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is no YAML: {plain(str(error))}") from None
    except (OSError, ValueError):
        return
    if aliases > MOST_ALIASES:
        raise ValueError(f"--config {path} has {aliases} aliases; write out what they stand for")


def run_stage(args: list[str], cli: type[BenchmarkCLI] = BenchmarkCLI) -> BenchmarkCLI:
    """Runs one stage.

    Args:
        args: The stage and its options; `--draft` is short for `--evaluation.draft true`.
        cli: What runs it, or `Rehearsal`, which needs no checkpoint.

    Returns:
        The stage's trainer, model and data, after it has run.
    """
    torch.set_float32_matmul_precision("high")
    if "--draft" in args:  # at the end, since a config that follows would undo it
        args = [*(arg for arg in args if arg != "--draft"), "--evaluation.draft=true"]
    return cli(
        DiffusionSystem,
        ImageDataModule,
        trainer_class=BenchmarkTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # else a copy of a model (EMA) holds this and the processes it started
        args=args if cli is Rehearsal else complete([args[0].replace("-", "_"), *args[1:]]),
        parser_class=Parser,
        seed_everything_default=42,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={},
        parser_kwargs={"prog": "python -m benchmark"},
    )
