"""Scores of clips: against the true clip at each time step, motion, masks against the truth, and FVD with its protocol.

FVD: Unterthiner et al. 2018, arXiv:1812.01717. Its published numbers come from I3D; bring that file as
"torchscript:<file>". Numbers of different extractors are never comparable:

    frames                the picture features named by eval.extractor (metrics/extractors.py), averaged over frames,
                          with the mean absolute difference of neighbours beside them
    own                   a 3-D network that the first evaluation trains on your training clips (metrics/own_clips.py)
    own:<folder>          such a network of another run or machine: clips.safetensors and clips.json, as the first one
                          says where it keeps them
    torchscript:<file>    your own network: float (B, 3, T, 224, 224) in [-1, 1] -> (B, d), such as I3D's 400 logits.
                          TorchScript runs what it holds, so only load files that you trust
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.data.base import RowDataset
from condgen.data.cache import cache_folder
from condgen.errors import ConfigError, DataError, ShapeError
from condgen.metrics.extractors import Extractor, extractor
from condgen.metrics.frechet import frechet_distance
from condgen.metrics.kernel import kid
from condgen.metrics.paired import psnr, shuffled, ssim
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.metrics.statistics import gaussian_of
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.registry import unknown

MIN_FVD = 256  # clips on each side, as in the first published tables
SHOWN = 16  # time steps of a curve that become scores of their own, at most
BLOCK = 64  # clips compared at a time
SIDE = 224  # px that an I3D takes


# against the truth, step by step


def curves(fake: Tensor, real: Tensor, network: Extractor | None = None) -> dict[str, Tensor]:
    """psnr and ssim (N, T) of clips (N, T, C, H, W) in [-1, 1] and, with a network, `perceptual`: the squared distance
    of unit feature vectors, in the manner of LPIPS; 0 = alike. A few clips at a time."""
    if fake.shape != real.shape or fake.dim() != 5:
        raise ShapeError(f"clips {tuple(fake.shape)} and true clips {tuple(real.shape)}; both (N, T, C, H, W)")
    parts: dict[str, list[Tensor]] = {}
    for some, true in zip(fake.split(BLOCK), real.split(BLOCK), strict=True):
        a, b = some.flatten(0, 1), true.flatten(0, 1)
        found = {"psnr": psnr(a, b), "ssim": ssim(a, b)}
        if network is not None:
            one, two = (F.normalize(network.features(x), dim=1) for x in (a, b))
            found["perceptual"] = (one - two).square().sum(1)
        for name, values in found.items():
            parts.setdefault(name, []).append(values.view(some.shape[:2]))
    return {name: torch.cat(values) for name, values in parts.items()}


def shown_steps(frames: int) -> list[int]:
    """The time steps of a curve that become scores: all of them, or 16 from the first to the last."""
    count = min(frames, SHOWN)
    return sorted({round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)})


def curve_scores(
    fake: Tensor, real: Tensor, last: Tensor, *, given: int = 0, network: Extractor | None, about: Mapping[str, str],
) -> list[Score]:  # fmt: skip
    """The mean over time of each curve, and `<curve>/t=<step>` for at most 16 time steps.

    given  frames at the start of the clips that are the condition itself: they are left out of the mean
    last   (N, C, H, W), the newest given frame: the floor is that frame, repeated
    network   of `perceptual`; None = without it
    Ceiling: none for psnr, 1 for ssim, 0 for perceptual.
    """
    network = network if real.shape[2] in (1, 3) else None
    made = curves(fake, real, network)
    copied = curves(last[:, None].expand_as(real), real, network)
    frames = fake.shape[1]
    scores = []
    for curve, values in made.items():
        fields = {**about, "n": str(len(fake)), "frames": str(frames), "floor": "copied-last-frame"}
        fields["given"] = str(given)
        if curve == "perceptual" and network is not None:
            fields |= {**network.signature_fields(), "distance": "unit-features-squared"}
        ceiling, better = {"psnr": None, "ssim": 1.0, "perceptual": 0.0}[curve], curve != "perceptual"
        for label, pick in [
            (curve, slice(given, None)),
            *((f"{curve}/t={t}", slice(t, t + 1)) for t in shown_steps(frames)),
        ]:
            each = values[:, pick].mean(1)
            scores.append(
                Score(
                    label, float(each.mean()), floor=float(copied[curve][:, pick].mean()), ceiling=ceiling,
                    error=_error(each), higher_is_better=better, signature=signature(label, **fields),
                )
            )  # fmt: skip
    return scores


# motion


def motion_energy(clips: Tensor) -> Tensor:
    """(N,) mean absolute difference of neighbouring frames of (N, T, C, H, W); 0 = a still picture."""
    if clips.dim() != 5 or clips.shape[1] < 2:
        raise ShapeError(f"motion needs clips (N, T, C, H, W) of at least 2 frames; got {tuple(clips.shape)}")
    return (clips[:, 1:] - clips[:, :-1]).abs().flatten(1).mean(1)


def motion_scores(fake: Tensor, real: Tensor, *, about: Mapping[str, str]) -> list[Score]:
    """motion_energy: floor 0, a still clip; ceiling that of real clips. More than the ceiling is flicker."""
    each = motion_energy(fake)
    return [
        Score(
            "motion_energy", float(each.mean()), floor=0.0, ceiling=float(motion_energy(real).mean()),
            error=_error(each), signature=signature("motion_energy", **about, n=len(fake), frames=fake.shape[1]),
        )
    ]  # fmt: skip


def given_scores(fake: Tensor, real: Tensor, given: int, *, about: Mapping[str, str], seed: int = 0) -> list[Score]:
    """Of clips (N, T, C, H, W) that start with `given` frames of the condition, in units of [-1, 1]:

    first_frame_l1      mean distance of these frames from the true ones. Floor: those of other clips; ceiling 0
    motion_from_given   mean distance of all later frames from the last of them. Floor 0: that frame copied; ceiling:
                        real clips
    """
    if fake.shape != real.shape or not 0 < given < fake.shape[1]:
        raise ShapeError(f"clips {tuple(fake.shape)} and {tuple(real.shape)}, {given} given frames: fewer than all")
    last = real[:, given - 1 : given]
    fields: dict[str, object] = {**about, "n": len(fake), "frames": fake.shape[1], "given": given}
    near = (fake[:, :given] - real[:, :given]).abs().flatten(1).mean(1)
    away = (fake[:, given:] - last).abs().flatten(1).mean(1)
    scores = [
        Score(
            "motion_from_given", float(away.mean()), floor=0.0, error=_error(away),
            ceiling=float((real[:, given:] - last).abs().mean()), signature=signature("motion_from_given", **fields),
        )
    ]  # fmt: skip
    others = None
    if len(fake) > 1:
        others = float((fake[:, :given] - real[shuffled(len(real), seed), :given]).abs().mean())
        fields |= {"floor": "other-clips", "seed": seed}
    first = Score(
        "first_frame_l1", float(near.mean()), floor=others, ceiling=0.0, error=_error(near), higher_is_better=False,
        signature=signature("first_frame_l1", **fields),
    )  # fmt: skip
    return [first, *scores]


# masks


def auc(values: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of `values` for bool `truth`, same shapes: the chance that a true pixel has the higher
    value; ties count half. Raises DataError where the truth has one class only."""
    values, truth = values.detach().flatten().double(), truth.flatten()
    positive = int(truth.sum())
    negative = truth.numel() - positive
    if not positive or not negative:
        raise DataError("an AUC needs pixels inside and outside of the truth")
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    upto = counts.cumsum(0)
    rank = (upto - counts).double() + (counts.double() + 1) / 2  # mean rank of each value, from 1
    total = float(rank[inverse][truth].sum())
    return (total - positive * (positive + 1) / 2) / (positive * negative)


def iou(values: Tensor, truth: Tensor, threshold: float = 0.5) -> Tensor:
    """(N,) intersection over union of `values` > threshold and bool `truth`, (N, ...); 1 where both are empty."""
    found, true = (values > threshold).flatten(1), truth.flatten(1)
    union = (found | true).sum(1)
    return torch.where(union > 0, (found & true).sum(1) / union.clamp_min(1), 1.0)


def mask_scores(mask: Tensor, truth: Tensor, *, about: Mapping[str, str], of: str = "", seed: int = 0) -> list[Score]:
    """mask_auc and mask_iou of masks (N, T, 1, H, W) in [0, 1] against the true ones, alpha in [0, 1].

    `of` ends the names: what the truth is. Floor: the masks of other clips; ceiling 1. Raises DataError below 2 clips.
    """
    if mask.shape != truth.shape:
        raise ShapeError(f"masks {tuple(mask.shape)} and truth {tuple(truth.shape)}; give equal shapes")
    if len(mask) < 2:
        raise DataError("mask scores shuffle the clips, which needs at least 2 rows")
    true = truth > 0.5
    other = mask[shuffled(len(mask), seed)]
    fields = {**about, "n": str(len(mask)), "frames": str(mask.shape[1]), "floor": "shuffled-masks", "seed": str(seed)}
    each = iou(mask, true)
    names = [f"mask_{kind}{'/' * bool(of)}{of}" for kind in ("auc", "iou")]
    return [
        Score(names[0], auc(mask, true), floor=auc(other, true), ceiling=1.0, signature=signature(names[0], **fields)),
        Score(
            names[1], float(each.mean()), floor=float(iou(other, true).mean()), ceiling=1.0, error=_error(each),
            signature=signature(names[1], **fields, threshold=0.5),
        ),
    ]  # fmt: skip


def moving_pixels(clips: Tensor, threshold: float = 0.2) -> Tensor:
    """float (N, T, 1, H, W): 1 where a frame differs from its clip's median over time by more than `threshold` of
    [-1, 1], in the mean over channels. What moves covers a pixel for less than half of the time."""
    # contiguous: torch 2.15 gives wrong medians along a dimension that was expanded
    still = clips.contiguous().median(1, keepdim=True).values
    return ((clips - still).abs().mean(2, keepdim=True) > threshold).float()


# FVD


@dataclass(frozen=True)
class ClipExtractor:
    """Clips -> features. network: float (B, T, C, H, W) in [-1, 1] -> (B, d); fields: what a reader has to know."""

    network: Callable[[Tensor], Tensor]
    fields: Mapping[str, str]

    @torch.no_grad()
    def features(self, clips: Tensor, *, batch_size: int = 8) -> Tensor:
        """float32 (N, d) on the CPU. Raises ShapeError and DataError."""
        if clips.dim() != 5 or not len(clips):
            raise ShapeError(f"an extractor of clips takes (N, T, C, H, W); got {tuple(clips.shape)}")
        out = []
        for part in clips.split(batch_size):
            made = self.network(part)
            if made.dim() != 2 or len(made) != len(part):
                raise DataError(f"{self.fields['ext']} gave {tuple(made.shape)} for {len(part)} clips, not (B, d)")
            out.append(made.float().cpu())
        return torch.cat(out)


def clip_extractor(
    name: str = "frames",
    *,
    pictures: Extractor | str = "auto",
    train: RowDataset | None = None,
    about: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> ClipExtractor:
    """By name, see the head of this file; `pictures` is, or names, the extractor of "frames". train: the training
    split, for "own", and `about` its name there. Any callable is one too: `ClipExtractor(network, {"ext": "mine#v1"})`.

    Raises ConfigError.
    """
    if name == "own" or name.startswith("own:"):
        return _own(train, about or {}, device, name.partition(":")[2])
    if name != "frames" and not name.startswith("torchscript:"):
        raise ConfigError(unknown("eval.fvd", name, ["frames", "own", "own:<folder>", "torchscript:<file>"]))
    if name == "frames":
        of = extractor(pictures, device=device) if isinstance(pictures, str) else pictures
        known = of.signature_fields()
        return ClipExtractor(lambda clips: _over_time(of, clips), {**known, "ext": f"frames-mean+steps:{known['ext']}"})
    of = extractor(name, device=device)  # ConfigError for names that are not there

    def whole(clips: Tensor) -> Tensor:
        return of.network(resized(clips, SIDE).to(of.device))

    return ClipExtractor(
        whole, {"ext": f"{of.name}#{of.fingerprint}", "resize": f"bilinear-{SIDE}", "literature": "no"}
    )


def _own(train: RowDataset | None, about: Mapping[str, str], device: torch.device | str, folder: str) -> ClipExtractor:
    from condgen.metrics.own_clips import load_clip_network, own_clip_network

    if folder:
        made = load_clip_network(Path(folder).expanduser()).to(device)
    elif train is None:
        raise ConfigError("eval.fvd=own is trained on the training split, and there is none to read by number")
    else:
        made = own_clip_network(train, cache_folder() / "classifiers", about=about, device=device)
    fields = {"ext": f"own-{made.what}#{made.fingerprint}", "resize": f"bilinear-antialias-{made.options.size}"}

    def network(clips: Tensor) -> Tensor:
        if clips.shape[2] != made.channels:
            raise ShapeError(f"clips of {clips.shape[2]} channels; this network was trained on {made.channels}")
        seen = pixels_to_float(pixels_to_uint8(clips))  # as if they had been saved
        return made.tower.features(seen.to(device))

    return ClipExtractor(network, {**fields, "literature": "no"})


def resized(clips: Tensor, side: int) -> Tensor:
    """(B, T, C, H, W) -> (B, 3, T, side, side): the shorter side to `side`, bilinear without antialiasing as in the
    common ports, then the centre; grey is repeated."""
    height, width = clips.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    frames = F.interpolate(clips.flatten(0, 1), size, mode="bilinear", align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cut = frames[:, :, top : top + side, left : left + side].unflatten(0, clips.shape[:2])
    return cut.transpose(1, 2).expand(-1, 3, -1, -1, -1)


def _over_time(of: Extractor, clips: Tensor) -> Tensor:
    """(B, 2 d): the mean over frames, and the mean absolute difference of neighbours (0 for one frame)."""
    found = of.features(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
    steps = (found[:, 1:] - found[:, :-1]).abs().sum(1) / max(clips.shape[1] - 1, 1)
    return torch.cat([found.mean(1), steps], dim=1)


def fvd_scores(
    fake: Tensor, real: Tensor, other: Tensor, *, network: ClipExtractor, about: Mapping[str, str], seed: int = 0
) -> list[Score]:
    """kvd (the kernel distance, unbiased) always, fvd where there are 256 clips on both sides.

    other   real clips of another split: the ceiling. Floor: uniform noise of the same shape
    """
    if min(len(fake), len(real), len(other)) < 4:
        raise DataError(f"KVD needs at least 4 clips a side; got {len(fake)}, {len(real)} and {len(other)}")
    noise = torch.rand(fake.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    made, true, more, bad = (network.features(x) for x in (fake, real, other, noise))
    height, width = fake.shape[-2:]
    fields = {
        **about, **network.fields, "frames": str(fake.shape[1]), "size": f"{height}x{width}", "n": str(len(fake)),
        "ref": str(len(real)), "seed": str(seed),
    }  # fmt: skip
    found = kid(true, made, seed=seed)
    scores = [
        Score(
            "kvd", found.value, floor=kid(true, bad, seed=seed).value, ceiling=kid(true, more, seed=seed).value,
            error=found.error, higher_is_better=False,
            signature=signature("kvd", **fields, subsets=found.subsets, subset_size=found.subset_size),
        )
    ]  # fmt: skip
    if min(len(fake), len(real)) >= MIN_FVD:
        known = gaussian_of(true)
        value, floor = (frechet_distance(known, gaussian_of(x)) for x in (made, bad))
        ceiling = frechet_distance(known, gaussian_of(more)) if len(more) >= MIN_FVD else None
        scores.append(
            Score(
                "fvd", value, floor=floor, ceiling=ceiling, higher_is_better=False, signature=signature("fvd", **fields)
            )
        )
    return scores


def _error(each: Tensor) -> float | None:
    """Standard error of the mean over clips."""
    return float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
