"""pythae 0.1.2: its VAE and VAE_IAF around given networks, or its own convolutional ones for CIFAR-10, 128 latents."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LATENT = 128
IAF_STEPS, IAF_LAYERS, IAF_WIDTH = 2, 3, 128  # as pythae has them by default


def load(folder: Path, *, iaf: bool, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> Any:
    """`folder` as `pip install --no-deps --target FOLDER pythae==0.1.2` makes it.

    encoder    pixels in [-1, 1] -> (mean, log standard deviation, anything); decoder   latents -> maps, of which the
               first three are the picture. None: pythae's own
    """
    sys.path.insert(0, str(folder.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pythae.models import VAE, VAE_IAF, VAE_IAF_Config, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
        from pythae.models.nn.benchmarks.cifar import Decoder_Conv_AE_CIFAR, Encoder_Conv_VAE_CIFAR

    class GivenEncoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            mean, log_std, _ = self.net(2 * x - 1)
            return ModelOutput(embedding=mean, log_covariance=2 * log_std)

    class GivenDecoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)[:, :3]))

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"input_dim": (3, 32, 32), "latent_dim": LATENT}
    if iaf:
        sizes |= {"n_made_blocks": IAF_STEPS, "n_hidden_in_made": IAF_LAYERS, "hidden_size": IAF_WIDTH}
    options = (VAE_IAF_Config if iaf else VAEConfig)(**sizes)
    return (VAE_IAF if iaf else VAE)(
        options,
        Encoder_Conv_VAE_CIFAR(options) if encoder is None else GivenEncoder(encoder),
        Decoder_Conv_AE_CIFAR(options) if decoder is None else GivenDecoder(decoder),
    )
