from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmark.cli import main
from benchmark.speed.attention import _peak_bytes

pytestmark = pytest.mark.slow


def test_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "new" / "speed.png"
    options = ["--sequences=1", "--embed_dim=8", "--repetitions=1", f"--output={plot}"]
    main(["attention-speed", "--tokens=[16, 256]", *options])
    assert Image.open(plot).width > 600
    shown = capsys.readouterr().out
    assert f"plot: {plot}" in shown.replace("\n", "")
    rows = re.findall(r"│ +(16|256) │ +([\d.]+) .* ([\d.]+) │ +[\d.]+x │\n", shown)
    assert [int(n) for n, _, _ in rows] == [16, 256, 16, 256]  # time, then memory
    rwkv, plain = (float(value) for value in rows[3][1:])
    assert plain >= 2 * 256 * 256 * 4 / 2**20  # attention matrix and its gradient
    assert rwkv < plain


def test_peak_memory_of_a_known_function() -> None:
    def run() -> None:
        x = torch.ones(2**18)
        y = x + 1
        del x
        y.sum()

    assert _peak_bytes(run, torch.device("cpu")) == pytest.approx(2 * 4 * 2**18, rel=0.01)


def test_numbers_below_1_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens=\[64, 0\], .* use numbers above 0"):
        main(["attention-speed", "--tokens=[64, 0]"])
