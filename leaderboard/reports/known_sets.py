"""Rows of known sets of images beside the rows of methods: what real and faulty images score under a protocol."""

from __future__ import annotations

from leaderboard.files import canonical_sha256
from leaderboard.protocols import PROTOCOLS
from leaderboard.record.entries import PACKAGED
from leaderboard.record.records import Record
from leaderboard.reports.cells import Cell, evaluation_cell, metric_name

FOLDER = PACKAGED.with_name("anchors")
"""Folder of the files that `validate-metrics` writes (`leaderboard.validation.anchors`)."""
STATUS = "known set"
"""Shown in place of a rank."""


def known_set_rows(record: Record, row: dict[str, Cell]) -> list[dict[str, Cell]]:
    """Returns rows of the real test images and of the most severe fault of each kind.

    Args:
        record: Any record of the table; only sets with the same reference, protocol and extractors are comparable.
        row: Any row of the table, for its columns.
    """
    path = FOLDER / f"{record.dataset.name}-{record.protocol.name}.json"
    if not path.is_file():
        return []
    from leaderboard.validation.anchors import read_anchors  # torch takes seconds to import

    found = read_anchors(path)
    parts = [network.split(" ") for network in found.networks]
    networks = {name: sha256 for name, sha256, *_ in parts if name != "fad"}  # which a record may lack
    sha256 = next(iter(networks.values())) if len(networks) == 1 else canonical_sha256(networks)
    key = (found.fingerprint, found.protocol_sha256, sha256)
    if key != (record.dataset.fingerprint, record.protocol.sha256, record.extractor.sha256):
        return []
    rows, full = [], PROTOCOLS[found.protocol].num_samples
    for anchor in {anchor.kind: anchor for anchor in found.sets}.values():  # severities increase
        cells = {
            metric_name(k): evaluation_cell(k, v) for k, v in sorted(anchor.metrics.items()) if metric_name(k) in row
        }
        shares = {metric_name(k): evaluation_cell(k, v) for k, v in anchor.metrics.items() if k.endswith("_ae")}
        cells |= {name: cell for name, cell in shares.items() if name in row}  # the tables show the autoencoder's
        cells |= {
            "#": Cell(STATUS),
            "Method": Cell(f"{anchor.title} ({anchor.images:,} images)" if anchor.images < full else anchor.title),
            "Variant": Cell(""),
            "Samples": Cell(f"{anchor.images:,}", anchor.images),
        }
        rows.append({name: cells.get(name, Cell("-")) for name in row})
    return rows
