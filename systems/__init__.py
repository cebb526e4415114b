"""Methods: one LightningModule per published spiking diffusion model, and the layers they share."""

from systems.ann_snn import ANNSNN
from systems.ddpm import DDPM
from systems.sddpm import SDDPM
from systems.sdit import SDiT
from systems.sdm import SDM

__all__ = ["SDDPM", "SDM", "DDPM", "ANNSNN", "SDiT"]
