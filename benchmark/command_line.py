"""Parsing of options: Lightning's parser with short messages, and the newest run as the default checkpoint."""

from __future__ import annotations

import json
import pydoc
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

import datamodules
import systems
from benchmark.configs import suggestion
from benchmark.messages import condense, explain_nested, from_own_code
from benchmark.runs import (
    RUNS,
    checkpoint_in,
    configuration_of,
    find_checkpoint,
    newest_run,
    run_of,
    update_config,
)

MAX_ALIASES = 20
"""Limit on aliases in a YAML file: nested, 20 expand to some thousand values, 100 to more than fits in memory."""


class Parser(LightningArgumentParser):
    """Lightning's parser with error messages of one line, which list the known classes if one is mistyped."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a config, which may have been written by an earlier version."""
        return super().parse_string(_complete_config(update_config(content)), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message and exits with code 2."""
        message = condense(message)
        if not self.exit_on_error:  # the parser of a class within another one, which completes the message
            super().error(message, ex)
        own = from_own_code(ex)
        message = own or explain_nested(message) or message
        if 'Parser key "trainer.logger"' in message:
            message += "; give the class of a logger, such as CSVLogger or WandbLogger, a list of them, true or false"
        if "import path string" in message and "NestedArg" not in message:
            known = {"model": systems.__all__, "data": datamodules.__all__}
            for key, names in known.items():
                if f'Parser key "{key}"' in message:
                    classes = [n for n in names if n != "ImageDataModule" and not n.endswith(("Error", "Scheduler"))]
                    message += f"\nknown classes of --{key}: {', '.join(classes)}"
        if not own and (missing := re.search(r"No module named '([^'.]+)", message)):
            message += (
                f"\nrun in the folder that contains {missing[1]}, name that folder by PYTHONPATH=FOLDER, or install it "
                "with `pip install -e FOLDER`"
            )
        if absent := re.search(r'Parser key "config": File does not exist: \'(.*)\'', message):
            message += f"\n{suggestion(absent[1])}"
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

    `--ckpt_path best` and `--ckpt_path last` become files of the newest run, and a folder the weights in it. `fit` uses
    the config of a run only to resume it, that is with --ckpt_path and without --config.

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
    if typed.ckpt_path in (None, "best", "last"):
        path = find_checkpoint(newest_run(Path(typed.folder or RUNS)), typed.ckpt_path or "last")
    else:
        path = checkpoint_in(Path(typed.ckpt_path))
        if not path.is_file():
            raise FileNotFoundError(
                f"--ckpt_path {path} is not a file; name a checkpoint (*.ckpt, *.safetensors), a folder of "
                "`export`, zoo:NAME, best or last"
            )
    print(f"{stage} of {path}")
    if not configs:
        rest = ["--config", _config_of(path), *rest]
    return [stage, *rest, "--ckpt_path", str(path)]


def _config_of(checkpoint: Path) -> str:
    """Returns the config file of the run folder of a checkpoint, or the configuration of one elsewhere as YAML."""
    if (run := run_of(checkpoint)) is None:
        return yaml.safe_dump(configuration_of(checkpoint), sort_keys=False)
    _check_config(run / "config.yaml")
    return str(run / "config.yaml")


def complete_loggers(args: list[str]) -> list[str]:
    """Adds an empty `save_dir`, which stands for the run folder, to loggers in the options of a stage."""
    completed = list(args)
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        option = option.removesuffix(".class_path")
        if option not in ("--trainer.logger", "--trainer.logger+"):
            continue
        if equals:
            completed[i] = f"{option}={_complete_value(value)}"
        elif i + 1 < len(args):
            completed[i] = option
            completed[i + 1] = _complete_value(args[i + 1])
    return completed


def _complete_value(text: str) -> str:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    completed = _with_save_dir(given)
    return text if completed == given else json.dumps(completed)


def _complete_config(text: str) -> str:
    """Does the same as `complete_loggers` for the text of a config."""
    try:
        config = yaml.safe_load(text) if "logger" in text else None
    except yaml.YAMLError:
        return text
    trainer = config.get("trainer") if isinstance(config, dict) else None
    given = trainer.get("logger") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or (completed := _with_save_dir(given)) == given:
        return text
    trainer["logger"] = completed
    return yaml.safe_dump(config, sort_keys=False)


def _with_save_dir(given: Any) -> Any:
    """Returns the value of `--trainer.logger` with an empty `save_dir` in each logger that accepts one and has none."""
    if isinstance(given, list):
        return [_with_save_dir(item) for item in given]
    spec = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(spec, dict) or not isinstance(name := spec.get("class_path"), str):
        return given
    found = pydoc.locate(name) if "." in name else next((c for c in _subclasses(Logger) if c.__name__ == name), None)
    init_args = spec.get("init_args") or {}
    if not isinstance(found, type) or "save_dir" not in signature(found).parameters or "save_dir" in init_args:
        return given
    return spec | {"init_args": init_args | {"save_dir": ""}}


def _subclasses(parent: type[Any]) -> Iterator[type[Any]]:
    children: list[type[Any]] = parent.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


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
