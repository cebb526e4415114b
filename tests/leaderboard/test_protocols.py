from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from leaderboard.protocols import OFFLINE_V1, STANDARD_V1, Protocol, canonical_sha256


def test_hash_ignores_key_order_and_sees_every_value() -> None:
    assert canonical_sha256({"a": 1, "b": [2]}) == canonical_sha256({"b": [2], "a": 1})
    assert canonical_sha256({"a": 1}) != canonical_sha256({"a": 2})


@pytest.mark.parametrize(
    ("protocol", "sha256"),
    [
        (STANDARD_V1, "093006c67fcf82f8b2d8497cef0b3286a9efb1b880e57177bea0fa39692c64e0"),
        (OFFLINE_V1, "e337bdc2ba1a03de9c26cac4d9cd5388b742d2ec4b4ef38c2d4e9754013d5fd1"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_published_protocols_never_change(protocol: Protocol, sha256: str) -> None:
    """A changed protocol needs a new name, since records carry this hash."""
    assert protocol.sha256 == sha256
    assert canonical_sha256(protocol.description()) == sha256
    assert replace(protocol, sample_seed=1).sha256 != sha256


def test_protocols_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        STANDARD_V1.num_samples = 1  # type: ignore[misc]


def test_fewer_samples_make_a_draft_and_more_are_refused() -> None:
    assert STANDARD_V1.is_draft(49_999)
    assert not STANDARD_V1.is_draft(50_000)
    assert not OFFLINE_V1.is_draft(10_000)
    with pytest.raises(ValueError, match=r"10001 generated .* 'offline-v1', which takes 2000 to 10000"):
        OFFLINE_V1.is_draft(10_001)


def test_inception_score_only_where_it_means_something() -> None:
    assert STANDARD_V1.metrics_for("cifar10") == ("fid", "kid", "is")
    assert STANDARD_V1.metrics_for("mnist") == ("fid", "kid")
    assert OFFLINE_V1.metrics_for("digits") == ("fd", "kd")
