"""The former name of a method: `SpikingRWKV` was called `SDiT` before the suite had the network of SDiT's release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMER, PRESENT = "SDiT", "SpikingRWKV"
"""Class names of the suite's fully spiking design."""
FORMER_METHOD, PRESENT_METHOD = "sdit", "spiking-rwkv"
"""Its names in records and checkpoints."""
OWN_OPTIONS = frozenset({"inner_norm", "scan", "mlp_ratio", "beta", "reset_mechanism", "spike_grad"})
"""Options of `SpikingRWKV` that `SDiT` does not have; the config of a run always contains them."""


def is_former(model: Any) -> bool:
    """Returns whether the `model` of a config names `SDiT` but has the options of `SpikingRWKV`."""
    if not isinstance(model, Mapping):
        return False
    path, options = model.get("class_path"), model.get("init_args")
    named = isinstance(path, str) and path.rpartition(".")[2] == FORMER
    return named and isinstance(options, Mapping) and not OWN_OPTIONS.isdisjoint(options)


def with_present_name(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with the present class path of the method; any other config is returned as it is."""
    if not is_former(config.get("model")):
        return config
    return config | {"model": config["model"] | {"class_path": f"systems.{PRESENT}"}}
