"""The parts of `Replay` that need no GPU; `tests/test_cuda.py` replays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from systems.ops.cuda_graphs import MAX_RELATIVE_ERROR, Replay, _without_hooks, relative_error


def test_runs_eagerly_on_cpus() -> None:
    network, calls = nn.Linear(2, 2), []
    network.register_forward_hook(lambda *_: calls.append(None))
    replay = Replay(network, network)
    for k in range(6):
        x = torch.full((3, 2), float(k))
        assert torch.equal(replay(x), network(x))
    assert len(calls) == 12


def test_error_is_relative_to_each_tensor() -> None:
    expected = [torch.tensor([3.0, 4.0]), torch.tensor([100.0])]
    assert relative_error(expected, expected) == 0
    assert relative_error([torch.tensor([3.0, 4.5]), torch.tensor([101.0])], expected) == pytest.approx(0.1)
    assert not relative_error([torch.tensor([3.0, float("nan")]), expected[1]], expected) <= MAX_RELATIVE_ERROR


def test_comparing_does_not_call_hooks() -> None:
    network, calls = nn.Sequential(nn.Linear(2, 2)), []
    network[0].register_forward_hook(lambda *_: calls.append(None))
    with _without_hooks(network):
        network(torch.ones(1, 2))
    assert not calls
    network(torch.ones(1, 2))
    assert len(calls) == 1
