"""Errors of datasets."""

from __future__ import annotations


class DatasetNotFoundError(FileNotFoundError):
    """No source of a dataset was found; the message names the paths that were tried and the remedies."""


class DatasetError(ValueError):
    """A source was found but is malformed; the message names the file."""
