"""Spiking layers: neurons, their surrogate gradients, and the axis of SNN time steps."""
