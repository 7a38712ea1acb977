"""How adversarial networks start: DCGAN's initial weights, and spectral norm on every layer."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as normalise_spectrum


def initialise(module: nn.Module) -> None:
    """DCGAN: convolutions N(0, 0.02) with bias 0, batch norm weight N(1, 0.02); linear layers keep the default."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def add_spectral_norm(network: nn.Module) -> None:
    """On every convolution and linear layer."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            normalise_spectrum(module)
