"""Where training is replayed on a GPU, and that it is not elsewhere; `tests/test_cuda.py` replays."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import SDDPM
from torch import nn

from benchmark.cli import main
from systems.ops.cuda_graphs import APART, Replay, TrainingReplay, _unwatched, distance


def test_graphs_are_refused_where_there_is_no_gpu(tmp_path: Path, uncompiled: None) -> None:
    with pytest.raises(ValueError, match=r"--graphs.enabled true .* but training is on cpu; leave it out"):
        main(["fit", *SDDPM, "--graphs.enabled=true", f"--trainer.default_root_dir={tmp_path}"])


@pytest.mark.parametrize("kind", [Replay, TrainingReplay])
def test_a_cpu_is_asked_every_time(kind: type) -> None:
    network, calls = nn.Linear(2, 2), []
    network.register_forward_hook(lambda *_: calls.append(None))
    replay = Replay(network, network) if kind is Replay else TrainingReplay(network)
    for k in range(6):
        x = torch.full((3, 2), float(k))
        assert torch.equal(replay(x), network(x))
    assert len(calls) == 12


def test_a_copy_trains_its_own_network() -> None:
    replay = TrainingReplay(nn.Linear(2, 2))
    other = copy.deepcopy(replay)
    x = torch.ones(1, 2)
    before = replay(x)
    with torch.no_grad():
        next(other._network.parameters()).zero_()
    assert torch.equal(replay(x), before)
    assert not torch.equal(other(x), before)


def test_distance_is_relative_to_each_tensor() -> None:
    wanted = [torch.tensor([3.0, 4.0]), torch.tensor([100.0])]
    assert distance(wanted, wanted) == 0
    assert distance([torch.tensor([3.0, 4.5]), torch.tensor([101.0])], wanted) == pytest.approx(0.1)
    assert not distance([torch.tensor([3.0, float("nan")]), wanted[1]], wanted) <= APART


def test_comparing_does_not_call_hooks() -> None:
    network, calls = nn.Sequential(nn.Linear(2, 2)), []
    network[0].register_forward_hook(lambda *_: calls.append(None))
    with _unwatched(network):
        network(torch.ones(1, 2))
    assert not calls
    network(torch.ones(1, 2))
    assert len(calls) == 1
