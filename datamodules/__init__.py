"""Datasets: one LightningDataModule per dataset, all with the same batch format, value range and reference images."""

from datamodules.base import ImageDataModule
from datamodules.celeba import CelebA
from datamodules.cifar10 import CIFAR10
from datamodules.digits import Digits
from datamodules.errors import DatasetError, DatasetNotFoundError
from datamodules.fmnist import FMNIST
from datamodules.kmnist import KMNIST
from datamodules.letters import Letters
from datamodules.mnist import MNIST
from datamodules.own import FromDataset, ImageFolder, Parquet

__all__ = [
    "MNIST",
    "FMNIST",
    "KMNIST",
    "Letters",
    "CIFAR10",
    "CelebA",
    "Digits",
    "ImageFolder",
    "Parquet",
    "FromDataset",
    "ImageDataModule",
    "DatasetError",
    "DatasetNotFoundError",
]
