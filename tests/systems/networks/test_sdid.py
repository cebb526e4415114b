from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from spiking_diffusion_reference import check_gradients, check_statistics, load
from torch import Tensor

from systems.networks.sdid import SDID
from systems.spiking_diffusion import _rename

Reference = Callable[[str], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", sys.maxsize)  # compilation takes longer than these tests


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("sdid_small.safetensors")


@pytest.fixture
def network(reference: Reference) -> SDID:
    return load(reference).denoiser


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_reproduces_the_released_network(mode: str, network: SDID, recorded: dict[str, Tensor]) -> None:
    network.train(mode == "train")
    logits = network(recorded["input.x_t"].squeeze(1), recorded["input.t"])
    torch.testing.assert_close(logits, recorded[f"output.{mode}"], rtol=0, atol=1e-5)


def test_reproduces_gradients_and_statistics(network: SDID, recorded: dict[str, Tensor]) -> None:
    network.train()
    tokens = recorded["input.x_t"].squeeze(1).clone().requires_grad_()
    network(tokens, recorded["input.t"]).square().sum().backward()
    check_gradients({"x": tokens.grad}, {"x": recorded["grad.input_train"].squeeze(1)}, floor=1e-3)
    prefix = "after_train."
    check_statistics(network, {_rename(k.removeprefix(prefix)): v for k, v in recorded.items() if k.startswith(prefix)})


def test_published_size() -> None:
    assert sum(p.numel() for p in SDID().parameters()) == 3_101_504


def test_calls_are_independent_and_grids_free() -> None:
    torch.manual_seed(0)
    network = SDID(num_codes=8, base_channels=4, num_steps=3).eval()
    tokens, t = torch.randint(9, (2, 7, 7)), torch.tensor([1, 49])
    first = network(tokens, t)
    assert network(torch.randint(9, (2, 16, 16)), t).shape == (2, 8, 16, 16)
    assert torch.equal(network(tokens, t), first)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps=0"):
        SDID(num_steps=0)
