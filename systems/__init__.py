"""Methods: one LightningModule per published spiking diffusion model, and the layers they share."""

from systems.fsddim import FSDDIM
from systems.sddpm import SDDPM

__all__ = ["FSDDIM", "SDDPM"]
