"""Methods: one LightningModule per published spiking diffusion model, and the layers they share."""

from systems.sddpm import SDDPM

__all__ = ["SDDPM"]
