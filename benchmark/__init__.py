"""Command line of the spiking diffusion benchmark (`python -m benchmark`)."""

__version__ = "0.2.0"
