"""`python -m benchmark convert`: converts a quantised DDPM into a spiking network."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from benchmark.runs import RUNS, new_run, run_of, update_config
from leaderboard.files import write_atomic
from systems.ann_snn import ANNSNN
from systems.checkpoints import check_state, network_state, read_trained, save_checkpoint
from systems.ddpm import DDPM, check_recorded
from systems.networks.ann_unet import GROUPS, ANNUNet
from systems.ops.quantise import QReLU

SIZES = ("in_channels", "base_channels", "channel_mult", "num_res_blocks", "norm_groups")
"""Arguments of the DDPM that determine its network, beside the activations."""

KEPT = (
    *SIZES,
    "dropout",
    "activation_bits",
    "scheduler",
    "num_inference_steps",
    "eta",
)
"""Arguments of the DDPM that the spiking network keeps."""


def convert(
    checkpoint: str,
    ddpm_config: str | None = None,
    spikes: Literal["unsigned", "signed", "unsigned_blocks"] = "unsigned",
    finetune_steps: int = 0,
    finetune_inputs: Literal["clean", "diffused"] = "clean",
) -> None:
    """Converts a trained DDPM with quantised activations into a spiking network, in a new run folder next to its own.

    Activations of `b` bits become `T = 2^b - 1` SNN time steps. Averaged weights are used if the DDPM has them.

    Args:
        checkpoint: Checkpoint of a DDPM.
        ddpm_config: Config of the DDPM, if the checkpoint is not in a run folder.
        spikes: Without negative spikes (as published), with them (as released), or without them only in the residual
            blocks.
        finetune_steps: Fine-tuning iterations per block, started after the conversion; 0 only converts.
        finetune_inputs: Inputs of fine-tuning: clean images (as released), or diffused ones.

    Raises:
        FileNotFoundError: If a file is missing.
        FileExistsError: If the new run folder exists already.
        ValueError: If there is no config, or its model is not a quantised DDPM.
        CheckpointMismatchError: If the weights do not fit the configured DDPM.
    """
    if finetune_steps < 0:
        raise ValueError(f"finetune_steps={finetune_steps} iterations per block; give 0 to only convert, or more")
    source = read_trained(checkpoint, DDPM.method)
    settings, folder = _settings(checkpoint, ddpm_config)
    model = settings.get("model") or {}
    if str(model.get("class_path")).rsplit(".", 1)[-1] != DDPM.__name__:
        raise ValueError(f"the config has model {model.get('class_path')}, expected DDPM; give the config of training")
    arguments = {key: value for key, value in (model.get("init_args") or {}).items() if key in KEPT}
    _check(source, checkpoint, arguments)

    arguments |= {"init_from": checkpoint, "spikes": spikes, "finetune_inputs": finetune_inputs}
    arguments |= {"finetune_steps": finetune_steps} if finetune_steps else {}
    arguments["optimizer"] = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-6, "fused": True}}  # as released
    settings["model"] = {"class_path": "systems.ANNSNN", "init_args": arguments}
    trainer = {"max_epochs": -1, "max_steps": -1, "gradient_clip_val": None, "callbacks": None}
    settings["trainer"] = (settings.get("trainer") or {}) | trainer
    for key in ("ckpt_path", "optimizer", "lr_scheduler"):
        settings.pop(key, None)
    data = str(settings["data"]["class_path"]).rsplit(".", 1)[-1].lower()
    run = new_run(folder, data, ANNSNN.__name__.lower())
    if run.exists():
        raise FileExistsError(f"{run} exists already; convert again")
    output = run / "checkpoints" / "last.ckpt"
    write_atomic(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    kept = ("state_dict", "process", "activation_bits", "training_data", "pytorch-lightning_version")
    start = {"method": ANNSNN.method, "epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
    groups = {"norm_groups": arguments.get("norm_groups", GROUPS)}  # not recorded in a bare state dict
    save_checkpoint({key: source[key] for key in kept if key in source} | start | groups, output)

    tune = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(output)]
    num_steps = 2 ** arguments.get("activation_bits", 2) - 1
    print(
        f"{checkpoint} with {num_steps} SNN time steps, spikes {spikes}: {output}\n"
        f"test:      python -m benchmark test --ckpt_path {shlex.quote(str(output))}\n"
        f"fine-tune: python -m benchmark {shlex.join(tune)}"
    )
    if finetune_steps:
        from benchmark.stages import run_stage

        run_stage(tune)


def _settings(checkpoint: str, config: str | None) -> tuple[dict[str, Any], Path]:
    """Returns the config of a checkpoint, and the folder in which to create the new run."""
    run = run_of(Path(checkpoint))
    if config is not None:
        path = Path(config)
    elif run is not None:
        path = run / "config.yaml"
    else:
        raise ValueError(f"{checkpoint} is not in a run folder; name its config too: `--ddpm_config CONFIG`")
    if not path.is_file():
        raise FileNotFoundError(f"--ddpm_config {path} is not a file; give the config of training (*.yaml)")
    settings = yaml.safe_load(update_config(path.read_text()))
    if not isinstance(settings, dict) or "data" not in settings:
        raise ValueError(f"{path} is not the config of a run; give the config that the DDPM was trained with")
    return settings, run.parent if run else Path((settings.get("trainer") or {}).get("default_root_dir") or RUNS)


def _check(source: dict[str, Any], checkpoint: str, arguments: dict[str, Any]) -> None:
    """Checks that the checkpoint fits the config, and that its activations are quantised."""
    if "network.tail.1.act_alpha" not in source["state_dict"]:
        raise ValueError(
            f"{checkpoint} has plain ReLUs, but only quantised activations can be converted; train a DDPM "
            "with --model.activation_bits 2 and convert it"
        )
    bits = arguments.get("activation_bits", 2)
    check_recorded(source, bits, arguments.get("norm_groups", GROUPS), checkpoint)
    sizes = {key: value for key, value in arguments.items() if key in SIZES}
    steps = ((arguments.get("scheduler") or {}).get("init_args") or {}).get("num_train_timesteps", 1000)
    with torch.device("meta"):
        network = ANNUNet(**sizes, num_train_timesteps=steps, activation=partial(QReLU, bits))
    state = network_state(source)
    check_state(state, network, checkpoint)
