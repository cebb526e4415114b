"""Methods: one LightningModule per published spiking diffusion model, and the layers they share."""

from systems.ann_snn import ANNSNN
from systems.ddpm import DDPM
from systems.sddpm import SDDPM
from systems.sdm import SDM
from systems.spiking_diffusion import SpikingDiffusion

__all__ = ["SDDPM", "SDM", "DDPM", "ANNSNN", "SpikingDiffusion"]
