"""Differences between two records."""

from __future__ import annotations

from leaderboard.record.records import Record

Row = tuple[str, str, str]


def provenance(record: Record) -> dict[str, str]:
    """Returns everything a result may depend on besides its configuration, by name."""
    checkpoint = record.checkpoint
    return {
        "method": record.method,
        "dataset": record.dataset.name,
        "data fingerprint": record.dataset.fingerprint,
        "data source": record.dataset.source,
        "protocol": record.protocol.name,
        "protocol sha256": record.protocol.sha256,
        "draft": str(record.draft),
        "extractor": record.extractor.name,
        "extractor sha256": record.extractor.sha256,
        "checkpoint sha256": checkpoint.sha256 if checkpoint else "none",
        "solver": record.solver,
        "NFE": str(record.nfe),
        "SNN time steps": str(record.num_steps),
        "conditional": "no" if record.conditional is None else f"guidance {record.conditional:g}",
        "code commit": f"{record.code.git_commit or 'unknown'}{' and changes' * bool(record.code.git_dirty)}",
        "device": record.hardware,
        **{f"version of {name}": number for name, number in record.code.versions.items()},
        **{f"seed of {name}": str(seed) for name, seed in record.seeds.items()},
    }


def differences(a: dict[str, str], b: dict[str, str]) -> list[Row]:
    """Returns name and both values of each difference; a missing value is shown as a dash."""
    names = dict.fromkeys([*a, *b])
    return [(name, a.get(name, "-"), b.get(name, "-")) for name in names if a.get(name) != b.get(name)]
