from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import get_args

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.protocols import (
    FOLDER,
    LOCKED,
    OFFLINE_V1,
    OFFLINE_V2,
    OFFLINE_V3,
    PROTOCOLS,
    STANDARD_V1,
    STANDARD_V2,
    STANDARD_V3,
    Protocol,
    ProtocolName,
    read_protocol,
)

MNIST = {"dataset": "mnist", "native": 28, "sample_seed": 0}


def test_hash_ignores_key_order_and_sees_every_value() -> None:
    assert canonical_sha256({"a": 1, "b": [2]}) == canonical_sha256({"b": [2], "a": 1})
    assert canonical_sha256({"a": 1}) != canonical_sha256({"a": 2})


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("standard-v3", "21f5f6c388da01de22f4ecd8d2e517a55854a626af8c6496ad76a4ec0805bbd8"),
        ("offline-v3", "075dee741bb0e5aba05127b230f8987368961c3a9581169309a3e93436cd6c1a"),
        ("standard-v2", "d5de938eabb3094d9520f4c89f139d306774373ccc90a32d3c745218236c285d"),
        ("offline-v2", "6f8ff1c941f3d0eb08ba8e1062f0e26b92b9704f11ccee421bdd694905adcbcd"),
        ("standard-v1", "34f9e30f29a01c2bbb8ec5ee8c8e3709a653f1f397163d69a14d33b78d30ea59"),
        ("offline-v1", "1ce16feafdec348dc58aedecb87633f841c7186b32850a3cfb5dd245dc344e87"),
        ("paper-sddpm", "2967d1b73a0f13a52ddcf71e0bffae46cc069a63a5ab3a3739f34acfca8f1e13"),
        ("paper-fsddim", "4df4ffb5a116320111eae6efb407f5314bc5a2d76393ac431326b031a5454df4"),
        ("paper-sdit", "7e5de453955622a9fd97c838ada56e213f2b609bd8ef77a23e9b8924479c0a38"),
        ("paper-spiking-diffusion", "a3e21a41cf665cf672c7afe10281107527c87e26f7a1a77a9e88e5a8484fb489"),
    ],
)
def test_published_protocols_never_change(name: str, sha256: str) -> None:
    """Records contain this hash, so a changed protocol needs a new name, a new lock and a new line here."""
    assert PROTOCOLS[name].sha256 == LOCKED[name] == sha256
    assert canonical_sha256(PROTOCOLS[name].description()) == sha256
    assert replace(PROTOCOLS[name], sample_seed=1).sha256 != sha256


def test_every_file_is_locked_and_every_name_can_be_chosen() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(LOCKED) == set(get_args(ProtocolName))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_samples: 50000", "num_samples: 40000", "was changed: .* Protocols are immutable: .* under a new name"),
        ("neighbours: 3", "neighbours: 5", "was changed"),
        ("never mirrored", "not mirrored", "was changed"),
        ("name: standard-v1", "name: standard-v9", "was changed"),
        ("quantisation: round", "quantisation: floor", r"is not a protocol \(quantisation: expected 'round' or"),
        ("sample_seed: 0\n", "", r"is not a protocol \(sample_seed: the field is missing\)"),
        (
            "fad: [fad_eval, fad_published]",
            "fad: fad_eval",
            r"is not a protocol \(fad: expected a list, found 'fad_eval'",
        ),
        ("fad: [fad_eval, fad_published]", "fad: [3]", r"is not a protocol \(fad\.0: expected str, found 3"),
        ("size: {}", "size: {", "is not a protocol"),
    ],
)
def test_edited_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (FOLDER / "standard-v1.yaml").read_text()
    path = tmp_path / "standard-v1.yaml"
    path.write_text(text.replace("# ", "#  "))
    assert read_protocol(path) == STANDARD_V1
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"standard-v1\.yaml {message}"):
        read_protocol(path)


def test_new_file_without_a_lock_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "standard-v9.yaml"
    path.write_text((FOLDER / "standard-v1.yaml").read_text().replace("standard-v1", "standard-v9"))
    with pytest.raises(ValueError, match="expected None"):
        read_protocol(path)
    with pytest.raises(ValueError, match=r"gone\.yaml is not a protocol"):
        read_protocol(tmp_path / "gone.yaml")


def test_protocols_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        STANDARD_V1.num_samples = 1  # type: ignore[misc]


def test_deviations_from_a_protocol_are_named() -> None:
    assert STANDARD_V1.deviations(**MNIST, size=28, num_samples=50_000) == []
    assert OFFLINE_V1.deviations(**MNIST, size=28, num_samples=10_000) == []
    assert OFFLINE_V2.deviations(**MNIST, size=28, num_samples=5_000) == []
    assert OFFLINE_V2.deviations(**MNIST, size=28, num_samples=2_000) == ["it takes 5,000 generated images, not 2,000"]
    assert STANDARD_V1.deviations("faces", 64, 64, 50_000, 0) == []  # also of datasets added later
    found = STANDARD_V1.deviations("mnist", 28, 32, 49_999, 7)
    assert found == [
        "it takes 50,000 generated images, not 49,999",
        "it compares mnist at 28x28 pixels, not 32x32 (leave out --data.fit resize)",
        "its first image has the seed 0, not 7",
    ]
    with pytest.raises(ValueError, match=r"10001 generated .* 'offline-v1', which takes 2000 to 10000"):
        OFFLINE_V1.deviations(**MNIST, size=28, num_samples=10_001)


@pytest.mark.parametrize("name", ["paper-sddpm", "paper-fsddim"])
def test_papers_compare_resized_images(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert protocol.deviations(**MNIST, size=32, num_samples=protocol.num_samples) == []
    (found,) = protocol.deviations(**MNIST, size=28, num_samples=protocol.num_samples)
    assert found == "it compares mnist at 32x32 pixels, not 28x28 (--data.image_size 32 --data.fit resize)"
    (found,) = protocol.deviations("kmnist", 28, 28, protocol.num_samples, 0)
    assert found == "it is defined for mnist, fmnist, cifar10, celeba, not for kmnist"


def test_sdit_compares_28_pixels() -> None:
    protocol = PROTOCOLS["paper-sdit"]
    assert protocol.deviations(**MNIST, size=28, num_samples=50_000) == []
    assert protocol.deviations("cifar10", 32, 28, 50_000, 0) == []
    (found,) = protocol.deviations("cifar10", 32, 32, 50_000, 0)
    assert found == "it compares cifar10 at 28x28 pixels, not 32x32 (--data.image_size 28 --data.fit resize)"


def test_reference_splits() -> None:
    def splits(protocol: Protocol) -> list[str]:
        return [protocol.reference_split(dataset) for dataset in ("mnist", "celeba")]

    assert splits(STANDARD_V1) == ["train", "train"]
    assert splits(PROTOCOLS["paper-fsddim"]) == ["test", "valid"]
    assert splits(PROTOCOLS["paper-spiking-diffusion"])[0] == "test"


def test_inception_score_only_where_it_is_meaningful() -> None:
    (view,) = STANDARD_V1.views
    assert set(view.metrics_for("cifar10")) == {"fid", "kid", "is", "precision_recall"}
    assert set(view.metrics_for("mnist")) == {"fid", "kid", "precision_recall"}
    assert view.metrics_for("cifar10")["is"] == {"splits": 10}
    assert set(OFFLINE_V1.views[0].metrics_for("digits")) == {"fd", "kd", "precision_recall"}


def test_first_versions_are_superseded_and_keep_their_metrics() -> None:
    assert {name: p.superseded_by for name, p in PROTOCOLS.items() if p.superseded_by} == {
        "standard-v1": "standard-v2",
        "offline-v1": "offline-v2",
        "standard-v2": "standard-v3",
        "offline-v2": "offline-v3",
    }
    for old, new in (("standard-v1", "standard-v2"), ("offline-v1", "offline-v2")):
        families = {family for view in PROTOCOLS[new].views for family in view.metrics}
        assert {family for view in PROTOCOLS[old].views for family in view.metrics} <= families


def test_third_versions_draw_their_real_images_and_change_nothing_else() -> None:
    for old, new in ((STANDARD_V2, STANDARD_V3), (OFFLINE_V2, OFFLINE_V3)):
        assert (old.reference_seed, new.reference_seed) == (None, 0)
        assert replace(new, name=old.name, notes=old.notes, reference_seed=None) == old


def test_extractors_of_the_second_versions() -> None:
    def names(protocol: Protocol, dataset: str) -> list[str]:
        return [view.extractor_name(dataset) for view in protocol.views if view.metrics_for(dataset)]

    assert names(OFFLINE_V2, "mnist") == ["mnist_ae", "mnist"]
    assert names(OFFLINE_V2, "cifar10") == ["cifar10_ae"]
    assert names(OFFLINE_V2, "mine") == ["mine_ae"]
    assert names(STANDARD_V2, "mnist") == ["mnist_ae", "inception-v3-compat"]
    assert names(STANDARD_V2, "celeba") == ["celeba_ae", "inception-v3-compat", "dinov2"]
    assert names(OFFLINE_V1, "mine") == ["mine"]
