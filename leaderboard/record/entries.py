"""Records with their files: how they are found, grouped and ranked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Literal, get_args

from leaderboard.files import canonical_sha256
from leaderboard.protocols import SUPERSEDED_BY
from leaderboard.record.records import MetricValue, Record, RecordError, find_records, read_record, redact_paths
from leaderboard.record.repetition import Repetition

RECORDS = "leaderboard/data/records"
"""Folder of the project's records in a checkout, including external ones."""
FOLDERS = ("runs", RECORDS)
"""Folders of the working folder that are searched for records by default."""
PACKAGED = Path(__file__).parents[1] / "data" / "records"
"""Folder of the project's records in this package, which is also searched by default."""


Status = Literal["measured", "transfer", "images", "draft"]
"""Ranked, or the reason why not: trained on other data, images made by other code, or not as the protocol says.

Tables list them in this order.
"""

STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Entry:
    """A record and its file."""

    path: Path
    record: Record

    @property
    def frechet(self) -> float:
        """Fréchet distance by which the entry is ranked; infinite if not measured."""
        if not self.record.metrics:
            return math.inf
        key, metric = headline(self.record)
        return metric.value if _metric_order(key) < _FRECHET else math.inf

    @property
    def status(self) -> Status:
        """Whether the entry is ranked, or why it is not."""
        if self.record.draft:
            return "draft"
        if self.record.images is not None:
            return "images"
        return "transfer" if self.record.transfers else "measured"

    @property
    def is_ranked(self) -> bool:
        """True if the entry is comparable with the others of its table by rank."""
        return self.status == "measured"

    @property
    def table_key(self) -> tuple[str, ...]:
        """Values that comparable entries share: data, protocol and extractor weights."""
        r = self.record
        return (r.dataset.name, r.protocol.name, r.protocol.sha256, r.dataset.fingerprint, r.extractor.sha256)

    @property
    def samples(self) -> Path:
        """File of the sample grid; exists if the record is in its run folder or in the leaderboard."""
        return self.path.parent.parent / "samples" / f"{self.path.stem}.png"

    @property
    def nearest(self) -> Path:
        """File of the training images nearest to those of the sample grid, in its order; exists if it was measured."""
        return self.samples.with_stem(f"{self.path.stem}-nearest")

    @property
    def superseded_by(self) -> str | None:
        """Name of the protocol that replaces the record's; None if there is none."""
        return SUPERSEDED_BY.get(self.record.protocol.name)

    @property
    def repetition(self) -> Path:
        """File that `leaderboard verify --keep` writes, without a name."""
        return self.path.parent.parent / "repetitions" / self.path.name

    def verification(self, name: str) -> Path:
        """Returns the file that `leaderboard verify --keep --by NAME` writes."""
        return self.repetition.with_name(name) / self.path.name

    @property
    def in_run(self) -> bool:
        """True if the record is in a run folder, which contains a configuration or a TensorBoard log."""
        run = self.path.parent.parent
        return self.path.parent.name == "records" and (
            (run / "config.yaml").is_file() or any(run.glob("events.out.tfevents*"))
        )

    def time(self) -> datetime:
        """Returns the time of the evaluation."""
        return datetime.fromisoformat(self.record.created)

    @cached_property
    def repeated(self) -> Record | None:
        """Repetition without a name that agrees: by the people, and usually on the machine, of the record."""
        return self._agreeing(self.repetition)

    @cached_property
    def verified(self) -> dict[str, Record]:
        """Repetitions by others that agree, by their name."""
        paths = self.repetition.parent.glob(f"*/{escape(self.path.name)}")
        found = {path.parent.name: self._agreeing(path) for path in paths}
        return {name: record for name, record in sorted(found.items()) if record is not None}

    def _agreeing(self, path: Path) -> Record | None:
        """Returns the record of a repetition if it is readable and agrees with this one."""
        try:
            repeated = read_record(path)
        except RecordError:
            return None
        return repeated if Repetition(self.record, repeated).agrees else None


def default_folders() -> list[str]:
    """Returns the folders searched for records by default: `FOLDERS`, and `PACKAGED` if it is not one of these."""
    in_checkout = Path(RECORDS).resolve() == PACKAGED.resolve()
    return list(FOLDERS) if in_checkout else [*FOLDERS, str(PACKAGED)]


def read_records(folders: Iterable[str | Path] | None = None) -> tuple[list[tuple[Path, Record]], list[str]]:
    """Reads the records in folders; of equal ones only one, if possible a repeated one with its sample grid.

    Records are equal if they differ only in the time of the evaluation and in what was measured of speed and memory,
    as after two tests of one checkpoint with the same options. Of these, the newest is returned; all files are kept.

    Args:
        folders: Folders to search; `default_folders()` if not given.

    Returns:
        The records with their files, and an error message for each broken record.

    Raises:
        FileNotFoundError: If a folder does not exist, unless it is one of the default `FOLDERS`.
    """
    searched = default_folders() if folders is None else list(map(str, folders))
    if missing := [folder for folder in searched if folder not in FOLDERS and not Path(folder).is_dir()]:
        raise FileNotFoundError(
            f"--records {', '.join(missing)}: not a folder; give folders to search, such as [{', '.join(FOLDERS)}]"
        )
    entries: dict[str, Entry] = {}
    broken = []
    for path in find_records(searched):
        try:
            entry = Entry(path, redact_paths(read_record(path)))
        except RecordError as error:
            broken.append(str(error))
            continue
        key = _result(entry.record)
        if key not in entries or _preference(entry) > _preference(entries[key]):
            entries[key] = entry
    return [(entry.path, entry.record) for entry in entries.values()], broken


def _result(record: Record) -> str:
    """Returns a hash of everything in a record that is equal whenever the test is repeated."""
    content = asdict(record)
    for name in ("created", "wall_time_seconds"):
        del content[name]
    for name in ("images_per_second", "peak_memory_bytes"):
        (content["cost"] or {}).pop(name, None)
    return canonical_sha256(content)


def _preference(entry: Entry) -> tuple[bool, datetime, bool]:
    return bool(entry.verified or entry.repeated), entry.time(), entry.samples.is_file()


def order_metrics(keys: Iterable[str]) -> list[str]:
    """Returns metric keys in column order, Fréchet distance first."""
    return sorted(set(keys), key=lambda key: (_metric_order(key), key))


def headline(record: Record) -> tuple[str, MetricValue]:
    """Returns key and value of the metric that ranks a record: the Fréchet distance if it was measured."""
    key = min(record.metrics, key=lambda key: (_metric_order(key), key))
    return key, record.metrics[key]


def table_metrics(keys: Iterable[str]) -> list[str]:
    """Returns the metric keys that tables show, in column order.

    A distance leaves the tables where the same without the bias of few images was measured, precision and recall where
    density and coverage were; of these, those of the autoencoder are shown if there are several. Records have all.
    """
    known = set(keys)
    hidden = {key for key in known if key.startswith("fd_infinity_")}
    hidden |= {key.replace("_unbiased", "", 1) for key in known if key.startswith("fd_unbiased_")}
    hidden |= {"fad_eval"} if "fad_unbiased" in known else set()
    per_image = [key for key in known if re.fullmatch("(precision|recall|density|coverage)(_.*)?", key)]
    if any(key.startswith("coverage") for key in per_image):
        with_encoder = any(key.endswith("_ae") for key in per_image)
        hidden |= {key for key in per_image if key.startswith(("precision", "recall"))}
        hidden |= {key for key in per_image if with_encoder and not key.endswith("_ae")}
    return order_metrics(known - hidden)


_ORDER = ("fd_unbiased_dinov2", "fd_unbiased_.*_ae", "fid|fid_.*|fd_.*", "kid_mean|kd_.*", "is_.*", ".*")
"""Metrics in column order; the first one that a record has ranks it, if it is a Fréchet distance.

The distance in features of the autoencoder leads, because it keeps the orders of known sets (`validate-metrics`); on
colour images the one in features of DINOv2 precedes it.
"""
_FRECHET = 3
"""Number of the patterns that are of Fréchet distances."""


def _metric_order(key: str) -> int:
    """Sort key of metrics: Fréchet distances, kernel distances, Inception score, others."""
    return next(i for i, pattern in enumerate(_ORDER) if re.fullmatch(pattern, key))
