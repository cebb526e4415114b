"""Diffusion processes and the samplers that diffusers does not have."""
