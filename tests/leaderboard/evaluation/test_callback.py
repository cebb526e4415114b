from __future__ import annotations

import pytest
from lightning.pytorch import LightningModule, Trainer

from leaderboard.evaluation.callback import Evaluation


def test_another_lightning_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"it is not a systems\.base\.DiffusionSystem; derive"):
        Evaluation().setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "test")
