"""Records with their files: those of folders, and what ranks them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from leaderboard.files import canonical_sha256
from leaderboard.record.records import MetricValue, Record, RecordError, find_records, read_record, redact_paths
from leaderboard.record.repetition import Repetition

RECORDS = "leaderboard/data/records"
"""Folder of the records that belong to the project, those of others among them."""
FOLDERS = ("runs", RECORDS)
"""Folders that are searched for records if none is given."""


@dataclass(frozen=True)
class Entry:
    """A record and the file it came from."""

    path: Path
    record: Record

    @property
    def frechet(self) -> float:
        """The Fréchet distance that ranks the entry, infinite if it was not measured."""
        if not self.record.metrics:
            return math.inf
        key, metric = headline(self.record)
        return metric.value if _kind(key) == 0 else math.inf

    @property
    def table_key(self) -> tuple[str, ...]:
        """What entries must share to be comparable: data, protocol and weights of the extractor."""
        r = self.record
        return (r.dataset.name, r.protocol.name, r.protocol.sha256, r.dataset.fingerprint, r.extractor.sha256)

    @property
    def samples(self) -> Path:
        """File of the grid of samples, which is there if the record still lies in its run."""
        return self.path.parent.parent / "samples" / f"{self.path.stem}.png"

    @property
    def repetition(self) -> Path:
        """File of the repetition that `leaderboard verify --keep` leaves."""
        return self.path.parent.parent / "repetitions" / self.path.name

    @property
    def in_run(self) -> bool:
        """Whether the record is in a run folder, which has a configuration or a TensorBoard log."""
        run = self.path.parent.parent
        return self.path.parent.name == "records" and (
            (run / "config.yaml").is_file() or any(run.glob("events.out.tfevents*"))
        )

    def time(self) -> datetime:
        """Returns the time of the evaluation."""
        return datetime.fromisoformat(self.record.created)

    @cached_property
    def verified(self) -> Record | None:
        """The repetition, if there is one that agrees with the record."""
        try:
            repeated = read_record(self.repetition)
        except RecordError:
            return None
        return repeated if Repetition(self.record, repeated).agrees else None


def read_records(folders: Iterable[str | Path]) -> tuple[list[tuple[Path, Record]], list[str]]:
    """Reads the records of folders, a copy of one only once, preferably where its samples lie.

    Returns:
        The records, each with its file, and a message for each that is broken.

    Raises:
        FileNotFoundError: If a folder does not exist, other than those that are searched by default.
    """
    searched = list(map(str, folders))
    if missing := [folder for folder in searched if folder not in FOLDERS and not Path(folder).is_dir()]:
        raise FileNotFoundError(
            f"--records {', '.join(missing)} is no folder; give folders to search, such as [{', '.join(FOLDERS)}]"
        )
    entries: dict[str, Entry] = {}
    broken = []
    for path in find_records(searched):
        try:
            entry = Entry(path, redact_paths(read_record(path)))
        except RecordError as error:
            broken.append(str(error))
            continue
        content = canonical_sha256(asdict(entry.record))
        if content not in entries or (entry.samples.is_file() and not entries[content].samples.is_file()):
            entries[content] = entry
    return [(entry.path, entry.record) for entry in entries.values()], broken


def order_metrics(keys: Iterable[str]) -> list[str]:
    """Returns metric keys in the order of columns: the Fréchet distance first."""
    return sorted(set(keys), key=lambda key: (_kind(key), key))


def headline(record: Record) -> tuple[str, MetricValue]:
    """Returns the metric that ranks a record, with its key: the Fréchet distance where it was measured."""
    key = min(record.metrics, key=lambda key: (_kind(key), key))
    return key, record.metrics[key]


def _kind(key: str) -> int:
    """Order of the metrics: Fréchet, kernel, Inception score, others."""
    patterns = ("fid|fid_.*|fd_.*", "kid_mean|kd_.*", "is_.*", ".*")
    return next(i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, key))
