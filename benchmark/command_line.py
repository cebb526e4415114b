"""The command line of the stages: Lightning's parser with short messages, and the newest run where none is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

import datamodules
import systems
from benchmark.messages import plain
from benchmark.runs import RUNS, find_checkpoint, newest_run, run_of, update_config

MOST_ALIASES = 20
"""Aliases of a YAML file that are unfolded: nested, 20 can stand for some thousand values, 100 for more than fit."""


class Parser(LightningArgumentParser):
    """Lightning's parser, whose message is one line, and on a mistyped class names the known ones."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a config, which may have been written by an earlier version."""
        return super().parse_string(update_config(content), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with exit code 2."""
        message = plain(message)
        if "import path string" in message and "NestedArg" not in message:
            known = {"model": systems.__all__, "data": datamodules.__all__}
            for key, names in known.items():
                if f'Parser key "{key}"' in message:
                    classes = [n for n in names if n != "ImageDataModule" and not n.endswith(("Error", "Scheduler"))]
                    message += f"\nknown classes of --{key}: {', '.join(classes)}"
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {message}\ntip: `python -m benchmark COMMAND --help` lists every option", file=sys.stderr)
        sys.exit(2)  # without the usage, which is pages long


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
