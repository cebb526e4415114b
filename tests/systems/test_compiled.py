from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from systems import compiled


def test_works_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object) -> Tensor:
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(compiled, "COMPILE_FROM", 0)
    monkeypatch.setattr(compiled, "compiler_failed", False)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: no_compiler)
    double = compiled.compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="no working compiler"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is tried and told once
        assert double(torch.ones(2)).tolist() == [2, 2]


def test_memory_of_any_layout_is_seen_in_its_order() -> None:
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for x in (last, last.unflatten(0, (2, 1)), torch.randn(2, 3, 4)):
        assert compiled.dense(x) is x
        assert compiled.memory(x, 2, -1).data_ptr() == x.data_ptr()
        assert torch.equal(compiled.memory(x, 2, -1)[1].sort().values, x[1].flatten().sort().values)
    gap = torch.randn(2, 3, 8)[..., ::2]
    assert torch.equal(compiled.dense(gap), gap)
    assert compiled.dense(gap).is_contiguous()
