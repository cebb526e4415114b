"""Methods: one LightningModule per published spiking diffusion model, and the layers they share."""

from systems.sddpm import SDDPM
from systems.sdm import SDM

__all__ = ["SDDPM", "SDM"]
