"""`python -m benchmark export`: writes a trained model as a folder that others can load, read about and host."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from benchmark.runs import WEIGHTS, checkpoint_in, configuration_of
from leaderboard.files import file_sha256, write_atomic
from leaderboard.protocols import FAULTS
from leaderboard.record.entries import Entry, read_records, table_metrics
from leaderboard.reports.cells import evaluation_cell
from leaderboard.reports.methods import Method
from systems.checkpoints import read_suite, save_safetensors

CARD = "README.md"
SAMPLES = "samples.png"
OWN_PATHS = ("root", "cache_dir", "init_from")
"""Options of data and model that name files of this machine and that sampling does not need."""


def export(run: str, folder: str, which: str = "last", half: bool = False, push_to_hub: str | None = None) -> None:
    """Writes weights (safetensors), configuration and a model card with the sample grid of a run to a new folder.

    `--ckpt_path FOLDER` of `test` and `predict`, and `benchmark.load(FOLDER)`, take it back. Optimiser states are left
    out. The card describes the records of the checkpoint, if it was tested.

    Args:
        run: Run folder, or a checkpoint.
        folder: Folder to write; it must not exist, or be empty.
        which: Checkpoint of a run folder: `last`, or `best` by validation loss.
        half: Round weights to 16 bits, in a file of half the size; they are loaded with 32 bits.
        push_to_hub: Repository on the Hugging Face hub, such as `user/sddpm-mnist`, to create and upload the folder to.

    Raises:
        FileNotFoundError: If there is no such run or checkpoint.
        FileExistsError: If the folder contains files.
        ValueError: If a weight is too large for 16 bits.
    """
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{folder} exists already; name a new folder, since nothing is overwritten")
    source = Path(run)
    checkpoint = checkpoint_in(source, which)
    configuration, content = _without_own_paths(configuration_of(checkpoint)), read_suite(checkpoint)
    sha256 = file_sha256(checkpoint)
    entries = [
        Entry(path, record)
        for path, record in (read_records([checkpoint.parent.parent])[0] if source.is_dir() else [])
        if record.checkpoint is not None and record.checkpoint.sha256 == sha256
    ]
    grids = [entry.samples for entry in sorted(entries, key=Entry.time) if entry.samples.is_file()]
    card = model_card(content, configuration, entries, has_samples=bool(grids), folder=target.name)
    part = target.with_name(f".{target.name}.part")  # so that a killed command leaves no incomplete folder
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_safetensors(content | {"configuration": configuration}, part / WEIGHTS, half)
        write_atomic(part / "config.yaml", yaml.safe_dump(configuration, sort_keys=False))
        if grids:
            write_atomic(part / SAMPLES, grids[-1].read_bytes())
        write_atomic(part / CARD, card)
        if target.exists():  # an empty folder, perhaps the working directory: it stays, and is filled
            for path in sorted(part.iterdir()):
                path.replace(target / path.name)
        else:
            part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    files = ", ".join(sorted(path.name for path in target.iterdir()))
    print(f"exported {checkpoint} to {folder}: {files}")
    print(f"try: python -m benchmark predict --ckpt_path {folder} --data.num_samples 16")
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        print(f"uploaded to {api.upload_folder(repo_id=push_to_hub, folder_path=target)}")


def _without_own_paths(configuration: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration without the paths of `OWN_PATHS`, which do not exist elsewhere."""
    copied = copy.deepcopy(configuration)
    for section in ("model", "data"):
        arguments = copied[section].get("init_args") or {}
        arguments |= {name: None for name in OWN_PATHS if name in arguments}
    return copied


def model_card(
    content: dict[str, Any], configuration: dict[str, Any], entries: list[Entry], has_samples: bool, folder: str
) -> str:
    """Returns the model card in Markdown, with the metadata block that the Hugging Face hub reads.

    Args:
        content: Checkpoint.
        configuration: `model` and `data`.
        entries: Records of this checkpoint.
        has_samples: Whether the folder contains a grid of samples.
        folder: Name of the folder, for the example commands.
    """
    entries = sorted(entries, key=Entry.time)
    results = [
        (entry.record, [(k, evaluation_cell(k, entry.record.metrics[k])) for k in table_metrics(entry.record.metrics)])
        for entry in entries
    ]
    template = Environment(
        loader=PackageLoader("benchmark.commands", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md.jinja")
    options = configuration["model"].get("init_args") or {}
    records = [record for record, _ in results]
    is_conditional = any(record.conditional is not None for record in records)
    is_spiking = any(record.cost is not None and record.cost.firing_rate is not None for record in records)
    method = content.get("method", "unknown")
    return template.render(
        conditional=is_conditional or bool(options.get("num_classes")),
        spiking=is_spiking,
        faults=FAULTS,
        title=Method(tuple(entries[-1:])).name if entries else method,
        seed=records[-1].seeds.get("training") if records else None,
        design=records[-1].design.name if records and records[-1].design else None,
        method=method,
        steps=content.get("global_step", 0),
        parameters=sum(tensor.numel() for tensor in content["state_dict"].values()),
        trained_on=", then ".join(data["name"] for data in content.get("training_data", [])) or "unknown",
        configuration=configuration,
        results=results,
        has_samples=has_samples,
        folder=folder,
    )
