"""Methods: one LightningModule per published spiking diffusion model, and the layers they share."""
