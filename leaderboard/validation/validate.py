"""`validate-metrics`: measures every metric on sets of images whose faults are known."""

from __future__ import annotations

import io
import math
import re
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torchmetrics import Metric

from datamodules.registry import data_module, make_data
from leaderboard.evaluation.callback import code_version
from leaderboard.evaluation.reference import build_parts, prepare_reference
from leaderboard.files import refuse_existing, write_atomic
from leaderboard.metrics.fad import FrechetAutoencoderDistance
from leaderboard.metrics.generation import MINIMUM, GenerationMetrics
from leaderboard.protocols import PROTOCOLS, ProtocolName
from leaderboard.record.records import MetricValue
from leaderboard.validation.anchors import Anchor, Anchors, describe, orders, summary
from leaderboard.validation.battery import REAL, SEVERITIES, known_sets

BATCH = 250
"""Images per batch."""

COLUMNS = {
    "fid": "FID",
    "fd_unbiased": "FD unb.",
    "fid_unbiased": "FID unb.",
    "kd": "kKD",
    "kid_mean": "kKID",
    "precision": "Prec.",
    "recall": "Recall",
    "density": "Dens.",
    "coverage": "Cov.",
    "authenticity": "Auth.",
    "fad_published": "FADpubl",
    "fad_eval": "FADeval",
    "fad_unbiased": "FAD unb",
}
"""Columns of the printed tables, in order: families of metrics and their headers; kernel distances times 1000."""
OTHERS = ("fd", "fd_infinity")
"""Families that are in the file and in the summary of orders only."""

Part = GenerationMetrics | FrechetAutoencoderDistance


def validate_metrics(
    data: str = "",
    protocol: ProtocolName = "offline-v3",
    root: str | None = None,
    images: int = 5000,
    output: str = "validation",
    fad_dir: str | None = None,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
    data_options: dict[str, Any] = {},  # noqa: B006 (never changed)
) -> None:
    """Measures every metric of a protocol on known sets: real test images, and the same with increasing faults.

    Prints a table for each extractor, the orders that each metric violates, and writes both values and a plot. Sets of
    less than 20 images, such as those of few classes of a small test split, are left out.

    Args:
        data: Dataset name, e.g. fmnist (required).
        protocol: How images are compared.
        root: Folder of the dataset; read from the Hugging Face hub if not given.
        images: Largest number of images of a set, evenly spread over the test split.
        output: Folder of the two new files, `<dataset>-<protocol>.json` and `.png`.
        fad_dir: Folder of the published autoencoders; adds the Fréchet autoencoder distance.
        inception_weights: Local file of the 2015 Inception weights, where they cannot be downloaded.
        torchvision_weights: Local file of torchvision's Inception weights, where they cannot be downloaded.
        extractor: File of another small extractor made by `train-extractor`.
        cache_dir: Folder of decoded images and reference statistics; the same as for `test` if not given.
        seed: Seed of the faults.
        data_options: Further options of the data module, such as '{center_crop: null}'.

    Raises:
        ValueError: If the dataset is unknown, or compared at another size under this protocol.
        FileExistsError: If one of the files exists.
    """
    chosen, kind = PROTOCOLS[protocol], data_module(data)
    paths = [Path(output) / f"{kind.name}-{protocol}{end}" for end in (".json", ".png")]
    refuse_existing(*paths, option="--output")
    given = {"root": root, "cache_dir": cache_dir}
    module = make_data(data, {key: value for key, value in given.items() if value is not None} | data_options)
    deviations = chosen.deviations(
        kind.name, kind.native_size, module.compared_size, chosen.num_samples, chosen.sample_seed
    )
    if deviations:
        raise ValueError(f"{protocol} cannot be validated on {data}: {'; '.join(deviations)}")
    module.prepare_data()
    module.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = build_parts(chosen, module, (inception_weights, torchvision_weights, extractor), fad_dir)
    prepare_reference([part.to(device) for part in parts], module, chosen, device)
    test, labels = module.labelled("test")
    train, _ = module.labelled("train")
    found, seconds = [], 0.0
    spread = torch.arange(min(images, len(test))) * len(test) // min(images, len(test))
    made = known_sets(test[spread], labels[spread], train, seed)
    sets = [known for known in made if len(known.images) >= MINIMUM]
    for known in track(sets, "known sets", transient=True, disable=not sys.stderr.isatty()):
        started = time.process_time()
        found.append(Anchor(known.kind, known.severity, len(known.images), _measure(parts, known.images, device)))
        if known.kind == REAL:
            seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = Anchors(
        dataset=module.name,
        fingerprint=module.fingerprint,
        protocol=protocol,
        protocol_sha256=chosen.sha256,
        networks=tuple(part.identity for part in parts),
        versions=code_version().versions,
        seconds=round(seconds, 1),
        peak_memory_bytes=peak,
        sets=tuple(found),
    )
    print(report(result))
    write_atomic(paths[0], result.text())
    write_atomic(paths[1], plot(result))
    print(f"\n{paths[0]}\n{paths[1]}")


def _measure(parts: Sequence[Part], images: Tensor, device: torch.device) -> dict[str, MetricValue]:
    """Returns every metric of images `(N, C, H, W)`; the parts keep their reference and forget earlier images."""
    values: dict[str, MetricValue] = {}
    for part in parts:
        for metric in (module for module in part.modules() if isinstance(module, Metric)):
            reference = {name: state for name, state in metric.metric_state.items() if name.startswith("reference_")}
            metric.reset()
            for name, state in reference.items():
                setattr(metric, name, state)
        for index in torch.arange(len(images)).split(BATCH):
            part.update_generated(images[index].to(device), index)
        values |= part.compute()
    return values


def report(result: Anchors) -> str:
    """Returns a table for each extractor, and the orders of each metric, in lines of up to 80 characters."""
    keys = list(dict.fromkeys(key for anchor in result.sets for key in anchor.metrics))
    lines = [f"{result.dataset} under {result.protocol}: {result.sets[0].images:,} real test images and faults of them"]
    for suffix in dict.fromkeys(_split(key)[1] for key in keys):
        own = {family: f"{family}{suffix}" for family in COLUMNS if f"{family}{suffix}" in keys}
        title = suffix.removeprefix("_") or "Inception and FAD"
        lines += ["", f"{title:<24}" + "".join(f"{COLUMNS[family]:>8}" for family in own)]
        for anchor in result.sets:
            cells = [_cell(family, anchor.metrics.get(key)) for family, key in own.items()]
            lines.append(f"{anchor.title:<24}" + "".join(f"{cell:>8}" for cell in cells))
    found = orders(result.sets)
    lines += ["", f"{'orders of known sets':<40}{'kept':>8}{'cannot tell':>14}{'violated':>11}"]
    for key, counts in summary(found).items():
        lines.append(f"{key:<40}{counts['kept']:>8}{counts['cannot tell']:>14}{counts['violated']:>11}")
    violated = [order for order in found if order.verdict == "violated"]
    if violated:
        lines += ["", "violated (the first set should be better than the second):"]
    for order in violated:
        lines += [f"  {part}" for part in _wrapped(describe(order))]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(text: str) -> Iterable[str]:
    """Splits a line of more than 78 characters after its key."""
    if len(text) <= 78:
        return [text]
    key, _, rest = text.partition(": ")
    return [f"{key}:", f"  {rest}"]


def _split(key: str) -> tuple[str, str]:
    """Returns the family of a metric and the rest of its key, which names the extractor."""
    family = max((f for f in [*COLUMNS, *OTHERS] if re.match(rf"{f}(_|$)", key)), key=len, default=key)
    return family, key.removeprefix(family)


def _cell(family: str, metric: MetricValue | None) -> str:
    if metric is None:
        return "-"
    value = metric.value * (1000 if family in ("kd", "kid_mean") else 1)
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def plot(result: Anchors) -> bytes:
    """Returns a plot of every metric over the severity of each fault, as PNG; bars are errors, lines real images."""
    shown = [key for key in dict.fromkeys(key for a in result.sets for key in a.metrics) if _split(key)[0] in COLUMNS]
    columns = 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    real = next(anchor for anchor in result.sets if anchor.kind == REAL)
    for position, key in enumerate(shown):
        axes = figure.add_subplot(rows, columns, position + 1)
        for kind, severities in SEVERITIES.items():
            members = [a for a in result.sets if a.kind == kind and key in a.metrics]
            steps = [0, *(1 + severities.index(anchor.severity) for anchor in members)]
            values = [real.metrics[key], *(anchor.metrics[key] for anchor in members)]
            if members:
                heights, errors = [v.value for v in values], [v.uncertainty for v in values]
                axes.errorbar(steps, heights, yerr=errors, label=kind, marker="o", markersize=3, linewidth=1)
        axes.axhline(real.metrics[key].value, color="0.6", linewidth=0.8)
        axes.set_title(key, fontsize=9)
        axes.set_xticks(range(1 + max(map(len, SEVERITIES.values()))))
        axes.tick_params(labelsize=7)
        if _split(key)[0].startswith(("f", "k")):
            floor = max(abs(real.metrics[key].value), real.metrics[key].uncertainty, 1e-9)
            axes.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(floor)))  # a power of ten: ticks stay apart
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=8)
    figure.supxlabel("severity of the fault (0: real test images)", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=72)
    return buffer.getvalue()
