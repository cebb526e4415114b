from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest

from leaderboard.files import canonical_sha256
from leaderboard.record.entries import RECORDS
from leaderboard.record.records import find_records, read_record
from leaderboard.record.renamed import OWN_OPTIONS, is_former
from systems.networks.rate_transformer import SDiTNetwork
from systems.networks.spiking_transformer import SpikingTransformer
from systems.sdit import SDiT
from systems.spiking_rwkv import SpikingRWKV

RENAMED = "20261129T055304Z"
"""When the fully spiking design got its present name; the names of record files begin with their times."""
NAMED_SDIT = sorted(path for path in find_records([RECORDS]) if json.loads(path.read_text())["method"] == "sdit")
OLD = [path for path in NAMED_SDIT if path.name < RENAMED]
PRESENT = [path for path in NAMED_SDIT if path.name >= RENAMED]


def test_the_options_tell_both_designs_apart() -> None:
    own = {*signature(SpikingRWKV).parameters, *signature(SpikingTransformer).parameters}
    released = {*signature(SDiT).parameters, *signature(SDiTNetwork).parameters}
    assert own >= OWN_OPTIONS
    assert not released & OWN_OPTIONS


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_old_records_are_read_under_the_present_name_and_not_edited(path: Path) -> None:
    record = read_record(path)
    assert record.method == "spiking-rwkv"
    assert record.config["model"]["class_path"] == "systems.SpikingRWKV"
    assert record.config_sha256 == canonical_sha256(record.config)
    assert json.loads(path.read_text())["config"]["model"]["class_path"] == "systems.SDiT"


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.stem)
def test_records_of_the_released_design_keep_their_name(path: Path) -> None:
    record = read_record(path)
    assert record.method == "sdit"
    assert record.config["model"]["class_path"].rpartition(".")[2] == "SDiT"


def test_there_are_records_of_both_designs() -> None:
    assert len(OLD) == 8
    assert PRESENT


@pytest.mark.parametrize(
    ("model", "former"),
    [
        ({"class_path": "systems.SDiT", "init_args": {"inner_norm": False}}, True),
        ({"class_path": "SDiT", "init_args": {"scan": "causal", "embed_dim": 32}}, True),
        ({"class_path": "systems.SDiT", "init_args": {"embed_dim": 384, "class_dropout": 0.1}}, False),
        ({"class_path": "systems.SpikingRWKV", "init_args": {"inner_norm": False}}, False),
        ({"class_path": "systems.SDiT"}, False),
        ("SDiT", False),
        (None, False),
    ],
)
def test_only_the_options_of_the_former_design_make_a_former_config(model: object, former: bool) -> None:
    assert is_former(model) == former
