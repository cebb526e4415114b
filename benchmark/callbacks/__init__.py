"""Callbacks of training: progress, monitoring, checkpoints, images."""
