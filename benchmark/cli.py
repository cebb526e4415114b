"""The command line: Lightning's stages on configs, and the suite's other commands, under one help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

from benchmark import __version__

STAGES = {
    "fit": "train a method on a dataset",
    "validate": "loss of a trained run on held-out images",
    "test": "generate images, measure them and write a record",
    "predict": "generate images as PNG files and a grid",
    "estimate-gamma": "add the statistic of Analytic-DPM to a checkpoint",
}
COMMANDS = {
    "speed": ("benchmark.speed.suite:speed", "measure neurons, steps, sampling, data and start, as ratios in one run"),
    "import": (
        "benchmark.commands.import_checkpoint:import_checkpoint",
        "turn an authors' checkpoint into one of the suite",
    ),
    "convert": ("benchmark.commands.convert:convert", "turn a quantised DDPM into a spiking network"),
    "leaderboard": ("leaderboard.reports.table:leaderboard", "show the table of the newest run (--wide, --all: more)"),
    "leaderboard render": (
        "leaderboard.reports.render:render",
        "write records and published numbers as a web page and files",
    ),
    "reference": (
        "leaderboard.evaluation.reference:reference",
        "measure the real images of a dataset, once for all tests",
    ),
    "leaderboard verify": ("benchmark.commands.verify:verify", "repeat the evaluation of a record and compare"),
    "leaderboard seeds": ("leaderboard.reports.seeds:seeds", "show means and spreads over training seeds"),
    "leaderboard compare": ("leaderboard.reports.compare:compare", "show what differs between two records"),
    "leaderboard add": ("leaderboard.add:add", "check a record and take it into the leaderboard"),
    "train-extractor": ("leaderboard.extractors.train:train_extractor", "train the suite's own feature extractor"),
    "activity": (
        "benchmark.commands.activity:activity",
        "draw spikes per layer and diffusion step, and a denoising strip",
    ),
    "loader-speed": ("benchmark.speed.loader:loader_speed", "measure the train loader, in images/s"),
    "attention-speed": ("benchmark.speed.attention:attention_speed", "measure RWKV against softmax attention"),
}
SWEEPS = {
    "sweep-threshold": (
        "benchmark.commands.sweeps:sweep_threshold",
        "test one checkpoint at several firing thresholds",
    ),
    "sweep-solvers": ("benchmark.commands.sweeps:sweep_solvers", "test one checkpoint with several solvers and NFE"),
    "matrix": ("benchmark.commands.matrix:matrix", "train and test methods on datasets with several seeds"),
    "relay": ("benchmark.commands.relay:relay", "train in legs of some minutes, on machines that keep nothing"),
    "regress": ("benchmark.commands.regress:regress", "train every method small and compare it with its baseline"),
    "ablate-sdit": (
        "benchmark.commands.ablate_sdit:ablate_sdit",
        "train and test SDiT and its ablations with several seeds",
    ),
}

EXAMPLES = """\
  python -m benchmark fit --config configs/quickstart.yaml      train a small SDDPM on embedded digits (2 minutes)
  python -m benchmark test                                      evaluate the newest run under runs/
  python -m benchmark leaderboard                               see the result
  python -m benchmark fit --config configs/sddpm_fmnist.yaml --data.root FOLDER
  python -m benchmark fit --help                                every option
"""


def print_help() -> None:
    """Prints what a newcomer can type next."""
    rows = STAGES | {name: line for name, (_, line) in (SWEEPS | COMMANDS).items()}
    print(
        "Reference benchmark for spiking diffusion models.\n\nusage: python -m benchmark COMMAND [--help] [options]\n"
    )
    print("commands:")
    for name, line in rows.items():
        print(f"  {name:<19} {line}")
    print(f"\nto begin:\n{EXAMPLES}")


def complete_flags(command: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """Accepts boolean options without a value: `--wide` is short for `--wide true`."""
    flags = {f"--{name}" for name, option in signature(command).parameters.items() if isinstance(option.default, bool)}
    pairs = zip(args, [*args[1:], "--"], strict=False)
    return [f"{arg}=true" if arg in flags and following.startswith("-") else arg for arg, following in pairs]


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: What follows `python -m benchmark`; taken from the command line if not given.

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
    elif args[0] in SWEEPS:
        module, function = SWEEPS[args[0]][0].split(":")
        getattr(import_module(module), function)(args[1:])
    elif args[0] in COMMANDS:
        from jsonargparse import auto_cli

        module, function = COMMANDS[args[0]][0].split(":")
        command = getattr(import_module(module), function)
        auto_cli(command, args=complete_flags(command, args[1:]), prog=f"python -m benchmark {args[0]}")
    else:
        known = ", ".join([*STAGES, *SWEEPS, *COMMANDS])
        print(f"error: unknown command {args[0]!r}; choose one of: {known}", file=sys.stderr)
        sys.exit(2)
