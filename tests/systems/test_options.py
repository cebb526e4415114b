"""Options of networks, which methods accept as `**kwargs`, on the command line."""

from __future__ import annotations

import pytest

from benchmark.cli import main
from systems import SDDPM

METHODS = {
    "SDDPM": ("base_channels", "attention_levels", "num_steps"),
    "SDM": ("base_channels", "attention_levels", "init_from"),
    "DDPM": ("base_channels", "dropout"),
    "ANNSNN": ("base_channels", "channel_mult"),
    "FSDDIM": ("base_channels", "norm", "activate_first_conv"),
    "SDiT": ("embed_dim", "class_dropout", "num_classes", "reconstruction"),
    "SpikingRWKV": ("embed_dim", "scan", "num_steps"),
}
INTERNAL = ("num_train_timesteps", "activation", "temporal_scaling")


@pytest.mark.parametrize("method", METHODS)
def test_help_lists_the_options_of_the_network(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--model.help=systems.{method}"])
    text = capsys.readouterr().out
    for option in METHODS[method]:
        assert f"--model.{option} " in text
    for option in set(INTERNAL) - ({"num_train_timesteps"} if method == "FSDDIM" else set()):
        assert f"--model.{option} " not in text  # set by the method


@pytest.mark.parametrize("method", METHODS)
def test_unknown_options_are_refused(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--model={method}", "--model.base_chanels=8", "--data=Digits", "--print_config"])
    assert "base_chanels" in capsys.readouterr().err


def test_unknown_options_are_refused_in_python() -> None:
    with pytest.raises(TypeError, match="base_chanels"):
        SDDPM(base_chanels=8)
