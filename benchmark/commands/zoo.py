"""`python -m benchmark zoo`: lists the trained models that come with the suite; adds one to them."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.table import Table

from benchmark.commands.export import CARD, SAMPLES, model_card
from benchmark.runs import WEIGHTS
from benchmark.zoo import PREFIX, zoo_folders
from leaderboard.files import file_sha256, write_atomic
from leaderboard.record.entries import Entry, headline, read_records
from leaderboard.reports.cells import evaluation_cell
from leaderboard.reports.methods import Method
from leaderboard.reports.terminal import terminal
from systems.checkpoints import read_suite


def zoo() -> None:
    """Lists the trained models that come with the suite, with the result of each.

    `--ckpt_path zoo:NAME` of `test`, `predict` and `activity`, and `benchmark.load("zoo:NAME")`, load one.
    """
    console = terminal()
    if not (folders := zoo_folders()):
        console.print("the zoo has no models yet; train one with `fit`, or take a checkpoint of your own")
        return
    measured = {
        record.checkpoint.sha256: Entry(path, record)
        for path, record in read_records()[0]
        if record.checkpoint is not None and not record.draft
    }
    table = Table(box=None, pad_edge=False)
    for column in ("--ckpt_path", "method", "dataset", "result", "MB"):
        table.add_column(column, no_wrap=True)
    for folder in folders:
        data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["class_path"]
        method, result = "", "no record"
        if (entry := measured.get(file_sha256(folder / WEIGHTS))) is not None:
            key, value = headline(entry.record)
            method, result = Method((entry,)).name, f"{key} {evaluation_cell(key, value)}"
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        table.add_row(f"{PREFIX}{folder.name}", method, data.rsplit(".", 1)[-1], result, f"{size:.1f}")
    console.print(table)
    console.print(f"try: python -m benchmark predict --ckpt_path {PREFIX}{folders[0].name} --data.num_samples 16")


def add_to_zoo(exported: Path, checkpoint: Path, entry: Entry, folder: Path) -> None:
    """Copies an exported model that was measured to the zoo, with a card that describes its record.

    Args:
        exported: Folder made by `export`, whose weights were measured.
        checkpoint: Checkpoint that it was exported from.
        entry: Record of these weights.
        folder: Folder in the zoo; an earlier copy of the same weights is replaced.

    Raises:
        ValueError: If the record is of other weights.
        FileExistsError: If the folder contains other weights.
    """
    sha256 = file_sha256(exported / WEIGHTS)
    if entry.record.checkpoint is None or entry.record.checkpoint.sha256 != sha256:
        raise ValueError(f"{entry.path} is not the record of {exported / WEIGHTS}; test these weights first")
    weights = folder / WEIGHTS
    if weights.is_file() and file_sha256(weights) != sha256:
        raise FileExistsError(f"{folder} contains other weights; name the new model otherwise, or remove the folder")
    configuration = yaml.safe_load((exported / "config.yaml").read_text(encoding="utf-8"))
    has_samples = entry.samples.is_file()
    card = model_card(read_suite(checkpoint), configuration, [entry], has_samples, f"{PREFIX}{folder.name}")
    if has_samples:
        write_atomic(folder / SAMPLES, entry.samples.read_bytes())
    write_atomic(folder / CARD, card)
    write_atomic(weights, (exported / WEIGHTS).read_bytes())
    if arguments := configuration["data"].get("init_args"):
        arguments.pop("num_samples", None)  # `predict` and `test` have numbers of their own
    # last, as the folder is complete with it
    write_atomic(folder / "config.yaml", yaml.safe_dump(configuration, sort_keys=False))
