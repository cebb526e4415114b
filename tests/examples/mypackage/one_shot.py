"""A generator that is not a diffusion model: a spiking variational autoencoder that decodes noise in one shot."""

import snntorch as snn
import torch
from torch import nn
from torch.nn import functional as F

from benchmark import DiffusionSystem, multistep


class SpikingVAE(DiffusionSystem):
    """Variational autoencoder of one spiking hidden layer on each side."""

    method = "spiking-vae"

    def __init__(self, image_size: int = 8, hidden: int = 128, latent: int = 16, num_steps: int = 4) -> None:
        super().__init__()
        self.num_steps, self.latent = num_steps, latent
        self.encoder = nn.Linear(image_size**2, hidden)
        self.encoder_neuron = multistep(snn.Leaky(beta=0.9))
        self.moments = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Linear(latent, hidden)
        self.decoder_neuron = multistep(snn.Leaky(beta=0.9))
        self.head = nn.Linear(hidden, image_size**2)

    def loss(self, images, generator=None):
        """Evidence lower bound of images `(B, 1, H, W)` in [-1, 1]."""
        spikes = self.encoder_neuron(self.encoder(images.flatten(1)).expand(self.num_steps, -1, -1))
        mean, log_variance = self.moments(spikes).mean(0).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 2
        error = F.mse_loss(self.decode(mean + noise * (log_variance / 2).exp()), images.flatten(1), reduction="sum")
        return (error + 0.1 * divergence) / len(images)

    def trajectory(self, seeds, image_shape):
        """Yields the samples `(B, 1, H, W)` at once."""
        yield self.decode(self.noise(seeds, (self.latent,))).view(-1, *image_shape)

    def decode(self, latents):
        """Maps latents `(B, latent)` to pixels `(B, H * W)`."""
        spikes = self.decoder_neuron(self.decoder(latents).expand(self.num_steps, -1, -1))
        return self.head(spikes).mean(0)
