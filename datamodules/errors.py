"""What can go wrong with a dataset before training starts."""

from __future__ import annotations


class DatasetNotFoundError(FileNotFoundError):
    """No source of a dataset is in reach; the message names what was tried and the ways out."""


class DatasetError(ValueError):
    """A source was found but is not what it should be; the message names the file."""
