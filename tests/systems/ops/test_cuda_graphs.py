"""The parts of `Replay` that need no GPU; `tests/test_cuda.py` replays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from systems.ops.cuda_graphs import APART, Replay, _unwatched, distance


def test_a_cpu_is_asked_every_time() -> None:
    network, calls = nn.Linear(2, 2), []
    network.register_forward_hook(lambda *_: calls.append(None))
    replay = Replay(network, network)
    for k in range(6):
        x = torch.full((3, 2), float(k))
        assert torch.equal(replay(x), network(x))
    assert len(calls) == 12


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
