"""DINOv2 through torch-fidelity, for colour images.

M. Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", https://arxiv.org/abs/2304.07193.
G. Stein et al., NeurIPS 2023, https://arxiv.org/abs/2306.04675, recommend its features over Inception's. Tested with
random weights only; a comparison with the real weights has not been made yet.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from leaderboard.extractors.base import Extractor
from leaderboard.protocols import DINOV2

REPOSITORY = "https://github.com/facebookresearch/dinov2"
WIDTH = 1024
"""Features of ViT-L/14."""


class DinoV2Extractor(Extractor):
    """torch-fidelity's DINOv2 ViT-L/14 with its own resize to 224x224.

    `torch.hub` loads code and weights from its folder (`$TORCH_HOME/hub`), and downloads what is missing there.

    Raises:
        RuntimeError: If they are neither there nor can be downloaded.
    """

    def __init__(self) -> None:
        try:
            network = FeatureExtractorDinoV2(DINOV2, ["dinov2"])
        except (URLError, OSError, RuntimeError, ImportError) as error:
            hub = Path(torch.hub.get_dir())
            raise RuntimeError(
                f"cannot load DINOv2 ({str(error).splitlines()[0]}). Put a copy of {REPOSITORY} at "
                f"{hub / 'facebookresearch_dinov2_main'} and its dinov2_vitl14_pretrain.pth at {hub / 'checkpoints'}, "
                "or evaluate under the protocol offline-v3"
            ) from error
        super().__init__("dinov2", num_features=WIDTH, num_classes=0, sha256=_parameters_sha256(network.model))
        self.network = network

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the features of the class token; there are no logits.

        Raises:
            ValueError: If the images do not have 3 channels.
        """
        if images.shape[1] != 3:
            raise ValueError(f"DINOv2 expects images of 3 channels, found shape {tuple(images.shape)}")
        (features,) = self.network(images)
        return features, features[:, :0]


def _parameters_sha256(network: nn.Module) -> str:
    """Returns a hash of all parameters and buffers, since torch.hub does not name the file of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}:".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
