"""Frames of a moving camera -> frames as a still camera would have seen them, as VGAN's videos were prepared.

Vondrick, Pirsiavash, Torralba, "Generating videos with scene dynamics", NIPS 2016, arXiv:1609.02612; the steps are
those of their released script: SIFT on every frame, matches by the ratio test, a homography to the frame before by
RANSAC, products of them back to the first frame of the clip, and the warped frame laid over the last stabilised one, so
that what the camera left keeps its last pixels. kornia finds features, matches and homographies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.data.decode import cut, resize
from condgen.errors import ConfigError, DataError

SMALLEST = 32  # pixels of a side in which features can be found
REFINED = 1.0  # pixels within which matches count after the published threshold
ERODE = 5  # pixels: the border of the covered region is blurred by the warp


@dataclass(frozen=True)
class StabiliseOptions:
    """How a clip is stabilised; the defaults are the published ones.

    size          pixels of a side of the square that is cut from the centre
    frames        of a clip at most; the next clip begins after them
    min_frames    a clip with fewer is discarded
    keep_before_failure   a clip that ends because a frame cannot be matched is kept if it has min_frames; published:
                          discarded
    ratio         a match is good if its distance is below this share of that to the second nearest feature
    min_matches   good matches that a frame needs, and of these as many must agree with one homography
    threshold     pixels of the video within which a match agrees
    features      looked for in a frame, the strongest first
    feature_side  frames are shrunk to this longer side to find features, which is faster; 0 = full size
    seed          of RANSAC
    """

    size: int = 128
    frames: int = 33
    min_frames: int = 16
    keep_before_failure: bool = False
    ratio: float = 0.7
    min_matches: int = 10
    threshold: float = 5.0
    features: int = 2000
    feature_side: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("size", 2), ("min_frames", 1), ("min_matches", 5), ("features", 10), ("feature_side", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.frames < self.min_frames:
            raise ConfigError(f"frames={self.frames} is below min_frames={self.min_frames}: every clip would be short")
        if not 0 < self.ratio < 1 or not self.threshold > 0:
            raise ConfigError(f"ratio={self.ratio} must lie between 0 and 1, threshold={self.threshold} above 0")
        if 0 < self.feature_side < SMALLEST:
            raise ConfigError(f"feature_side={self.feature_side}: at least {SMALLEST}, or 0 for the full size")


@dataclass
class StableClip:
    """One try at a clip.

    height, width   of the video's frames
    frames   stabilised, uint8 (3, size, size); as many as were read
    motions  of each frame, float64 (3, 3): its pixels, homogeneous (x, y, 1), to those of the first frame
    next     the frame that follows and belongs to the next clip; None at the end of the video
    problem  why the clip is to be discarded, or ""
    """

    height: int
    width: int
    frames: list[Tensor] = field(default_factory=list)
    motions: list[Tensor] = field(default_factory=list)
    next: Tensor | None = None
    problem: str = ""

    def camera_moved(self) -> float:
        """Pixels: how far a corner of the picture has moved from where it was in the first frame, at most."""
        right, low = float(self.width), float(self.height)
        corners = torch.tensor([[0, 0, 1], [right, 0, 1], [0, low, 1], [right, low, 1]]).T.double()
        moved = torch.stack(self.motions) @ corners
        return float((moved[:, :2] / moved[:, 2:] - corners[:2]).norm(dim=1).max())


@torch.inference_mode()
def stabilise(first: Tensor, rest: Iterator[Tensor], options: StabiliseOptions) -> StableClip:
    """A clip that stands still at `first`, uint8 (3, H, W); frames are taken from `rest` until it is full, the stream
    ends, a frame cannot be matched or the picture has left the first one. A frame that ends the clip is `next`.

    Deterministic. Raises DataError for frames that are too small to have features.
    """
    if min(first.shape[-2:]) < SMALLEST:
        raise DataError(f"frames of {first.shape[2]} x {first.shape[1]} pixels are too small; {SMALLEST} are needed")
    clip, shown = StableClip(*first.shape[-2:]), _square(first.float(), options.size)
    clip.frames.append(shown.round().to(torch.uint8))
    clip.motions.append(torch.eye(3, dtype=torch.float64))
    before, failed = _features(first, options), ""
    for frame in rest:
        clip.next = frame
        if len(clip.frames) == options.frames:
            break
        now = _features(frame, options)
        step, failed = _homography(now, before, options)
        if step is None:
            break
        motion = clip.motions[-1] @ step
        covered = _warped(torch.ones(1, *frame.shape[1:]), motion)
        covered = _square(1 - F.max_pool2d(1 - covered, ERODE, 1, ERODE // 2), options.size)
        if not bool((covered > 0).any()):  # the camera has turned away from the whole picture
            break
        shown = torch.lerp(shown, _square(_warped(frame.float(), motion), options.size), covered)
        clip.frames.append(shown.round().clamp(0, 255).to(torch.uint8))
        clip.motions.append(motion / motion[2, 2])
        clip.next, before = None, now
    if failed and not options.keep_before_failure:
        clip.problem = failed
    elif len(clip.frames) < options.min_frames:
        clip.problem = failed or f"it has {len(clip.frames)} frames; {options.min_frames} are needed"
    return clip


Features = tuple[Tensor, Tensor]
"""positions (N, 2) as x, y in pixels of the full frame, descriptors (N, D)"""


@lru_cache(maxsize=1)
def _detector(features: int) -> Any:
    from kornia.feature import SIFTFeature

    return SIFTFeature(num_features=features, descriptor_backend="pyramid")


def _features(frame: Tensor, options: StabiliseOptions) -> Features:
    from kornia.feature import get_laf_center

    height, width = frame.shape[-2:]
    ratio = min(1.0, options.feature_side / max(height, width)) if options.feature_side else 1.0
    small = (max(SMALLEST, round(height * ratio)), max(SMALLEST, round(width * ratio)))
    grey = resize(frame.float().mean(0, keepdim=True), small, "stretch")[0][None] / 255
    places, strengths, descriptors = _detector(options.features)(grey)
    found = strengths[0].flatten() > 0  # the list is filled up to its length with features that are none
    scale = torch.tensor([width / small[1], height / small[0]])
    centres = (get_laf_center(places)[0][found] + 0.5) * scale - 0.5  # pixel i is the point i, not a square from i on
    return centres, descriptors[0][found]


def _homography(now: Features, before: Features, options: StabiliseOptions) -> tuple[Tensor | None, str]:
    """float64 (3, 3) from pixels of `now` to those of `before`; or None and the reason."""
    from kornia.feature import match_snn
    from kornia.geometry.ransac import RANSAC

    if min(len(now[0]), len(before[0])) < 2:
        return None, f"there are {len(now[0])} features to match; is it a plain surface?"
    _, pairs = match_snn(now[1], before[1], options.ratio)
    if len(pairs) < options.min_matches:
        return None, f"{len(pairs)} good matches; {options.min_matches} are needed"
    ransac = RANSAC("homography", inl_th=options.threshold, seed=options.seed)
    found, agree = ransac(now[0][pairs[:, 0]], before[0][pairs[:, 1]])
    count = int(agree.sum())
    if count < options.min_matches or not bool(found.isfinite().all()) or abs(float(found[2, 2])) < 1e-8:
        return None, f"{count} of {len(pairs)} matches agree with one motion; {options.min_matches} are needed"
    return _refined(found.double(), now[0][pairs[agree, 0]], before[0][pairs[agree, 1]], options), ""


def _refined(found: Tensor, now: Tensor, before: Tensor, options: StabiliseOptions) -> Tensor:
    """The motion that most of the matches share within a pixel.

    Within 5 pixels the rim of what moves by itself agrees as well, and so do features of compression on a plain floor:
    on a real clip of a still camera, corners drifted by 17 pixels in 16 frames without this and by 1.2 with it.
    """
    from kornia.geometry.homography import find_homography_dlt_iterated
    from kornia.geometry.ransac import RANSAC

    _, close = RANSAC("homography", inl_th=min(REFINED, options.threshold), seed=options.seed)(now, before)
    if int(close.sum()) >= options.min_matches:
        places = now[None].double(), before[None].double()
        finer = find_homography_dlt_iterated(*places, close[None].double(), soft_inl_th=REFINED)[0]
        if bool(finer.isfinite().all()) and abs(float(finer[2, 2])) > 1e-8:
            found = finer
    return found / found[2, 2]


def _warped(pixels: Tensor, motion: Tensor) -> Tensor:
    from kornia.geometry.transform import warp_perspective

    return warp_perspective(pixels[None], motion[None].float(), (pixels.shape[1], pixels.shape[2]))[0]


def _square(pixels: Tensor, size: int) -> Tensor:
    return cut(resize(pixels, (size, size), "crop")[0], (size, size))[0]
