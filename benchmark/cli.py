"""The command line: a table of all commands, their help, and the dispatch to the module of each.

Nothing heavy is imported before the command is known, so that `--help` is immediate.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from benchmark import __version__

STAGES = {
    "fit": "train a method on a dataset",
    "validate": "compute the loss of a trained run on held-out images",
    "test": "generate images, measure them and write a record",
    "predict": "generate images as PNG files and a grid",
    "estimate-gamma": "prepare a checkpoint for sampling with Analytic-DPM",
}
"""Stages of the trainer: they take a config."""
PASS_THROUGH = {
    "sweep-threshold": (
        "benchmark.commands.sweeps:sweep_threshold",
        "test one checkpoint at several firing thresholds",
    ),
    "sweep-solvers": (
        "benchmark.commands.sweeps:sweep_solvers",
        "test one checkpoint with several samplers and step counts",
    ),
    "matrix": ("benchmark.commands.matrix:matrix", "train and test methods on datasets with several seeds"),
    "relay": ("benchmark.commands.relay:relay", "train in short sessions on machines that keep no files"),
    "regress": ("benchmark.commands.regress:regress", "train small networks and compare them with baselines"),
    "ablate-sdit": (
        "benchmark.commands.ablate_sdit:ablate_sdit",
        "train and test SDiT or SpikingRWKV and its ablations",
    ),
}
"""Commands that pass the options they do not know on to `fit` or `test`."""
COMMANDS = {
    "activity": ("benchmark.commands.activity:activity", "draw spikes per layer and diffusion step while sampling"),
    "reference": (
        "leaderboard.evaluation.reference:reference",
        "compute the statistics of real images before any test",
    ),
    "evaluate": ("leaderboard.evaluation.images:evaluate", "measure images made by other code"),
    "validate-metrics": (
        "leaderboard.validation.validate:validate_metrics",
        "measure the metrics on sets of images with known faults",
    ),
    "leaderboard": ("leaderboard.reports.table:leaderboard", "show the table of the newest run (more: --wide, --all)"),
    "leaderboard render": ("leaderboard.reports.render:render", "write the leaderboard as a web page and files"),
    "leaderboard energy": ("leaderboard.reports.energy:energy_table", "show methods by models of energy"),
    "break-even": (
        "leaderboard.reports.break_even_report:break_even_report",
        "show below which firing rate spikes cost less",
    ),
    "leaderboard seeds": ("leaderboard.reports.seeds:seeds", "show and write methods over training seeds"),
    "leaderboard compare": ("leaderboard.reports.compare:compare", "compare two groups of records, or two records"),
    "leaderboard verify": ("benchmark.commands.verify:verify", "repeat the evaluation of a record and compare"),
    "leaderboard add": ("leaderboard.add:add", "check a record and add it to the leaderboard"),
    "zoo": ("benchmark.commands.zoo:zoo", "list the trained models that come with the suite"),
    "export": ("benchmark.commands.export:export", "write a trained model as a folder to share"),
    "import": ("benchmark.commands.import_checkpoint:import_checkpoint", "convert a checkpoint released by authors"),
    "convert": ("benchmark.commands.convert:convert", "convert a quantised DDPM into a spiking network"),
    "train-extractor": ("leaderboard.extractors.train:train_extractor", "train the feature extractor of a dataset"),
    "speed": ("benchmark.speed.suite:speed", "measure neurons, training steps, sampling and data"),
    "loader-speed": ("benchmark.speed.loader:loader_speed", "measure the training data loader, in images/s"),
    "attention-speed": ("benchmark.speed.attention:attention_speed", "compare the speed of RWKV and softmax attention"),
}
"""All other commands, whose options are the arguments of a function."""

GROUPS = {
    "train": ("fit", "matrix", "relay", "ablate-sdit"),
    "evaluate": (
        "test",
        "validate",
        "predict",
        "estimate-gamma",
        "sweep-threshold",
        "sweep-solvers",
        "activity",
        "reference",
        "evaluate",
        "validate-metrics",
    ),
    "leaderboard": (*(name for name in COMMANDS if name.startswith("leaderboard")), "break-even"),
    "tools": (
        "zoo",
        "export",
        "import",
        "convert",
        "train-extractor",
        "regress",
        "speed",
        "loader-speed",
        "attention-speed",
    ),
}
"""The commands as the help shows them."""

HELP = """\
Reference benchmark for spiking diffusion models.

usage: python -m benchmark COMMAND [--help] [options]

to begin (2 minutes, nothing to download):
  python -m benchmark fit --config configs/quickstart.yaml
  python -m benchmark test               evaluate the newest run under runs/
  python -m benchmark leaderboard        show the result
  python -m benchmark COMMAND --help     list the options of a command
with a dataset on disk:
  python -m benchmark fit --config configs/sddpm_fmnist.yaml --data.root FOLDER
"""


def print_help() -> None:
    """Prints the first commands to type, then every command."""
    lines = STAGES | {name: line for name, (_, line) in (PASS_THROUGH | COMMANDS).items()}
    print(HELP)
    for group, names in GROUPS.items():
        print(f"{group}:", *(f"  {name:<20} {lines[name]}" for name in names), sep="\n")


def complete_flags(command: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """Adds what may be omitted: the value of boolean options, and the name of the first option, `--data`.

    `--wide` becomes `--wide=true`, and `reference mnist` becomes `reference --data mnist`. `--data.root` and
    `--data.cache_dir`, as `fit` and `test` have them, become `--root` and `--cache_dir`.
    """
    options = signature(command).parameters
    if args and not args[0].startswith("-") and "data" in options and options["data"].default == "":
        args = ["--data", *args]
    for name in options.keys() & {"root", "cache_dir"}:
        args = [re.sub(rf"^--data\.{name}(?=$|=)", f"--{name}", arg) for arg in args]
    flags = {f"--{name}" for name, option in options.items() if isinstance(option.default, bool)}
    pairs = zip(args, [*args[1:], "--"], strict=False)
    return [f"{arg}=true" if arg in flags and following.startswith("-") else arg for arg, following in pairs]


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: Arguments after `python -m benchmark`; `sys.argv[1:]` by default.

    Raises:
        SystemExit: With code 2 if the command is unknown or its options are wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    if " ".join(args[:2]) in COMMANDS:  # such as `leaderboard verify`
        args[:2] = [" ".join(args[:2])]
    if not args or args[0] in ("-h", "--help"):
        print_help()
    elif args[0] == "--version":
        print(__version__)
    elif args[0] in STAGES:
        from benchmark.stages import run_stage  # Lightning takes seconds to import

        run_stage(args)
    elif args[0] in PASS_THROUGH:
        module, function = PASS_THROUGH[args[0]][0].split(":")
        getattr(import_module(module), function)(args[1:])
    elif args[0] in COMMANDS:
        from jsonargparse import auto_parser

        module, function = COMMANDS[args[0]][0].split(":")
        command = getattr(import_module(module), function)
        parser = auto_parser(command, prog=f"python -m benchmark {args[0]}")
        options = parser.instantiate(parser.parse_args(complete_flags(command, args[1:])))
        command(**{name: options[name] for name in signature(command).parameters})  # auto_cli would drop `config`
    else:
        known = ", ".join([*STAGES, *PASS_THROUGH, *COMMANDS])
        print(f"error: unknown command {args[0]!r}; choose one of: {known}", file=sys.stderr)
        sys.exit(2)
