"""Methods, one LightningModule each, and the layers they share."""

from systems.ann_snn import ANNSNN
from systems.ddpm import DDPM
from systems.diffusion.analytic_dpm import AnalyticDPMScheduler
from systems.diffusion.dpm_solver import DPMSolverScheduler
from systems.diffusion.learned_variance import RespacedDDPMScheduler
from systems.diffusion.strided import StridedDDIMScheduler, StridedDDPMScheduler
from systems.fsddim import FSDDIM
from systems.sddpm import SDDPM
from systems.sdit import SDiT
from systems.sdm import SDM
from systems.spiking_diffusion import SpikingDiffusion
from systems.spiking_rwkv import SpikingRWKV

__all__ = [
    "SDDPM",
    "SDM",
    "FSDDIM",
    "SpikingDiffusion",
    "SDiT",
    "SpikingRWKV",
    "DDPM",
    "ANNSNN",
    "AnalyticDPMScheduler",
    "DPMSolverScheduler",
    "RespacedDDPMScheduler",
    "StridedDDIMScheduler",
    "StridedDDPMScheduler",
]
