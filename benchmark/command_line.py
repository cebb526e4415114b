"""Parsing of options: Lightning's parser with short messages, and the newest run as the default checkpoint."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

import datamodules
import systems
from benchmark.configs import suggestion
from benchmark.messages import condense
from benchmark.runs import RUNS, find_checkpoint, newest_run, run_of, update_config

MAX_ALIASES = 20
"""Limit on aliases in a YAML file: nested, 20 expand to some thousand values, 100 to more than fits in memory."""


class Parser(LightningArgumentParser):
    """Lightning's parser with error messages of one line, which list the known classes if one is mistyped."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a config, which may have been written by an earlier version."""
        return super().parse_string(update_config(content), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message and exits with code 2."""
        message = condense(message)
        if "import path string" in message and "NestedArg" not in message:
            known = {"model": systems.__all__, "data": datamodules.__all__}
            for key, names in known.items():
                if f'Parser key "{key}"' in message:
                    classes = [n for n in names if n != "ImageDataModule" and not n.endswith(("Error", "Scheduler"))]
                    message += f"\nknown classes of --{key}: {', '.join(classes)}"
        if missing := re.search(r'Parser key "config": File does not exist: \'(.*)\'', message):
            message += f"\n{suggestion(missing[1])}"
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {message}\ntip: `python -m benchmark COMMAND --help` lists every option", file=sys.stderr)
        sys.exit(2)  # without the usage, which fills pages


def pass_through_parser(command: str, description: str) -> ArgumentParser:
    """Returns the parser of a command that passes the options it does not know on to `fit` or `test`."""
    return ArgumentParser(
        f"python -m benchmark {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=ArgumentDefaultsHelpFormatter,
    )


def fill_in_newest_run(args: list[str]) -> list[str]:
    """Adds the config and the checkpoint of the newest run where a command names neither.

    `--ckpt_path best` and `--ckpt_path last` become files of the newest run. `fit` uses the config of a run only to
    resume it, that is with --ckpt_path and without --config.

    Args:
        args: A stage and its options.

    Raises:
        ValueError: If a config is given without a checkpoint, or a checkpoint outside a run folder without a config.
        FileNotFoundError: If there is no run, or the checkpoint does not exist.
    """
    stage, rest = args[0], args[1:]
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?", action="append", default=[])
    parser.add_argument("--ckpt_path", nargs="?")
    parser.add_argument("--trainer.default_root_dir", nargs="?", dest="folder")
    typed, _ = parser.parse_known_args(rest)
    configs = [Path(config) for config in typed.config if config is not None]
    for config in configs:
        _check_config(config)
    if any(a in ("-h", "--help") or a.startswith(("--help=", "--print_config")) for a in rest):
        return args
    if stage == "fit" and typed.ckpt_path is None:
        return args
    if configs and typed.ckpt_path is None:
        raise ValueError(
            f"`{stage} --config` needs a checkpoint: add `--ckpt_path CHECKPOINT`, or leave out --config to use the "
            "newest run"
        )
    run: Path | None
    if typed.ckpt_path in (None, "best", "last"):
        run = newest_run(Path(typed.folder or RUNS))
        path = find_checkpoint(run, typed.ckpt_path or "last")
    else:
        path = Path(typed.ckpt_path)
        if not path.is_file():
            raise FileNotFoundError(f"--ckpt_path {path} is not a file; give a checkpoint (*.ckpt), best or last")
        if configs:
            return args
        run = run_of(path)
    if run is None:
        raise ValueError(f"--ckpt_path {path} is not in a run folder; name its config too: `--config CONFIG`")
    print(f"{stage} of {path}")
    if not configs:
        _check_config(run / "config.yaml")
        rest = ["--config", str(run / "config.yaml"), *rest]
    return [stage, *rest, "--ckpt_path", str(path)]


def _check_config(path: Path) -> None:
    """Refuses files that the parser cannot report well; it reports all other errors itself.

    Raises:
        ValueError: If a config is not text or not YAML, or has so many aliases that it may expand to any size.
    """
    try:
        text = path.read_text(encoding="utf-8")
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    except UnicodeDecodeError:
        raise ValueError(f"--config {path} is not a text file in UTF-8; give a YAML file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {condense(str(error))}") from None
    except (OSError, ValueError):
        return
    if aliases > MAX_ALIASES:
        raise ValueError(f"--config {path} has {aliases} aliases; write the values in their place")
