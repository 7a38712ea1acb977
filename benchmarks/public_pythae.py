"""pythae 0.1.2: its VAE and VAE_IAF between its convolutional networks for CIFAR-10, 128 latents."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

LATENT = 128
IAF_STEPS, IAF_LAYERS, IAF_WIDTH = 2, 3, 128  # as pythae has them by default


def load(folder: Path, *, iaf: bool) -> Any:
    """`folder` as `pip install --no-deps --target FOLDER pythae==0.1.2` makes it."""
    sys.path.insert(0, str(folder.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pythae.models import VAE, VAE_IAF, VAE_IAF_Config, VAEConfig
        from pythae.models.nn.benchmarks.cifar import Decoder_Conv_AE_CIFAR, Encoder_Conv_VAE_CIFAR

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"input_dim": (3, 32, 32), "latent_dim": LATENT}
    if iaf:
        sizes |= {"n_made_blocks": IAF_STEPS, "n_hidden_in_made": IAF_LAYERS, "hidden_size": IAF_WIDTH}
    options = (VAE_IAF_Config if iaf else VAEConfig)(**sizes)
    return (VAE_IAF if iaf else VAE)(options, Encoder_Conv_VAE_CIFAR(options), Decoder_Conv_AE_CIFAR(options))
