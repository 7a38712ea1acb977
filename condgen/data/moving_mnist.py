"""Moving MNIST: two handwritten digits that bounce in a 64 x 64 frame, drawn as they are read.

Srivastava, Mansimov, Salakhutdinov, "Unsupervised learning of video representations using LSTMs", ICML 2015,
arXiv:1502.04681; the generator is that of their released code (class BouncingMNIST).

    root = FILE.npz                arrays x_train, x_test (uint8 (N, 28, 28)), the layout of Keras
    root = DIR                     what torchvision's MNIST takes: MNIST/raw/train-images-idx3-ubyte and t10k-...,
                                   unpacked or .gz as published, also in DIR itself; or mnist.npz in it
    root = mnist_test_seq.npy      the published test clips; training rows need one of the others
    root = null                    scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged: offline, and not MNIST

Pixels are soft (0..255), never binarised: the loss of the published figures takes them as probabilities, and its floor
of 86.3 nats a frame is their own entropy.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condgen import rng
from condgen.data.base import RowDataset
from condgen.data.npz import read_arrays
from condgen.data.video import probe, read_frames
from condgen.errors import ConfigError, DataError
from condgen.options import Range
from condgen.types import ConditionSpec, FramesSpec, Sample, TargetSpec

DIGIT, FRAME = 28, 64  # pixels of a side, as published
STEP = 0.1  # of the room to move in, per frame
MAX_BYTES = 1 << 30  # of an idx file
SMALL_TEST = 0.2  # of scikit-learn's digits, drawn in test clips only


class MovingMnist(RowDataset):
    """Clips of bouncing digits, made anew for every row of every epoch; the test rows never change.

    root      where the digits come from; see the head of data/moving_mnist.py
    size      pixels of a side; the digits have 28/64 of it
    split     "train", "val" or "test". Test clips show digits of the test part; val clips are fixed, of training digits
    frames    T, frames of the target
    past      frames before the target that become the `frames` condition; 0 = no condition
    overlap   the target starts with the past frames instead of following them
    digits    in each clip; where they overlap the brighter pixel is seen
    rows      clips in an epoch, and in the test split

    Published: 10 past and 10 target frames, two digits, 10,000 test clips. Row i of an epoch is a function of (seed,
    epoch, i), a test row of i alone. Target: uint8 (frames, 1, size, size).
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        size: Annotated[int, Range(8, 512)] = FRAME,
        split: Literal["train", "val", "test"] = "train",
        frames: Annotated[int, Range(1, 1000)] = 10,
        past: Annotated[int, Range(0, 1000)] = 10,
        overlap: bool = False,
        digits: Annotated[int, Range(1, 10)] = 2,
        rows: Annotated[int, Range(1)] = 10_000,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise ConfigError(f"data.split={split!r}: choose one of train, val, test")
        for name, value, low in (("size", size, 8), ("frames", frames, 1), ("past", past, 0), ("digits", digits, 1)):
            if value < low:
                raise ConfigError(f"data.{name}={value} must be at least {low}")
        if overlap and not 1 <= past <= frames:
            raise ConfigError(f"data.overlap=true needs 1 <= data.past <= data.frames; they are {past} and {frames}")
        self.size, self.split, self.digits = size, split, digits
        self.frames, self.past, self.overlap = frames, past, overlap
        self.length = frames if overlap else past + frames
        self._published = _published(root, split, size, digits, self.length)
        self.rows = rows if self._published is None else min(rows, probe(self._published).clips)
        small = max(1, round(DIGIT * size / FRAME))
        self._digits = _scaled(_digits(root, split), small) if self._published is None else np.empty((0, small, small))
        self.target = TargetSpec(1, size, size, frames)
        self.provides = ConditionSpec(frames=FramesSpec(past, 1, size, size) if past else None)

    def __len__(self) -> int:
        return self.rows

    def key(self, index: int) -> str:
        return f"moving-mnist-{self.split}-{index:06d}"

    @property
    def fingerprint(self) -> str:
        """Hash of the digits and of everything that decides how they move."""
        facts = (self.rows, self.size, self.split, self.digits, self.length, str(self._published or ""))
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(np.ascontiguousarray(self._digits).tobytes())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        clip = self._from_file(index) if self._published is not None else self._drawn(index, random)
        start = 0 if self.overlap else self.past
        return Sample(
            self.key(index),
            clip[start : start + self.frames],
            frames=clip[: self.past].clone() if self.past else None,
        )

    def _from_file(self, index: int) -> Tensor:
        assert self._published is not None
        return torch.stack([frame[:1] for frame in read_frames(self._published, stop=self.length, clip=index)])

    def _drawn(self, index: int, random: torch.Generator | None) -> Tensor:
        generator = random
        if generator is None or self.split != "train":  # a score must not change with the epoch
            generator = rng.generator("moving mnist", self.split, index)
        which = torch.randint(len(self._digits), (self.digits,), generator=generator).tolist()
        draws = torch.rand(self.digits, 3, generator=generator, dtype=torch.float64).tolist()
        clip = np.zeros((self.length, self.size, self.size), np.uint8)
        edge = self._digits.shape[-1]
        for digit, (x, y, angle) in zip(which, draws, strict=True):
            path = trajectory(x, y, 2 * math.pi * angle, self.length, self.size - edge)
            for t, (left, top) in enumerate(path):
                window = clip[t, top : top + edge, left : left + edge]
                np.maximum(window, self._digits[digit], out=window)
        return torch.from_numpy(clip)[:, None]


def trajectory(x: float, y: float, angle: float, frames: int, room: int) -> list[tuple[int, int]]:
    """(left, top) in whole pixels for each frame, from x, y in [0, 1), bouncing off 0 and 1; moved before frame 0."""
    vx, vy = math.cos(angle), math.sin(angle)
    path = []
    for _ in range(frames):
        x, y = x + vx * STEP, y + vy * STEP
        # clamped and not mirrored, as published: the digit touches the wall for one frame
        if x <= 0 or x >= 1:
            x, vx = min(max(x, 0.0), 1.0), -vx
        if y <= 0 or y >= 1:
            y, vy = min(max(y, 0.0), 1.0), -vy
        path.append((int(room * x), int(room * y)))
    return path


# where the digits come from


def _published(root: str | None, split: str, size: int, digits: int, length: int) -> Path | None:
    """The file of the published test clips, where root names it and the options are those it was made with."""
    if root is None or not root.lower().endswith(".npy"):
        return None
    file = Path(root).expanduser()
    if split != "test":
        raise ConfigError(
            f"data.root={root!r} holds test clips; training draws its own: set data.root to MNIST (a folder or .npz)"
        )
    info = probe(file)
    if (info.width, info.height) != (size, size) or (info.frames or 0) < length or digits != 2:
        raise ConfigError(
            f"{file.name} holds {info.frames} frames of {info.width} x {info.height} with two digits; "
            f"data.size={size}, data.digits={digits} and {length} frames are asked for"
        )
    return file


def _digits(root: str | None, split: str) -> np.ndarray:
    """uint8 (N, h, w) of the training or the test part."""
    part = "test" if split == "test" else "train"
    if root is None:
        return _sklearn_digits(part)
    place = Path(root).expanduser()
    if place.is_dir() and (place / "mnist.npz").is_file():
        place = place / "mnist.npz"
    if place.is_dir():
        found = _idx(place, part)
    else:
        (found,) = read_arrays(place, (f"x_{part}",))
    if found.dtype != np.uint8 or found.ndim != 3 or not len(found):
        raise DataError(f"{place}: the digits are {found.dtype} {found.shape}; uint8 (N, 28, 28) is needed")
    return found


def _idx(root: Path, part: str) -> np.ndarray:
    """The published file of a part, unpacked or not, where torchvision keeps it below its root, or in root itself."""
    name = f"{'train' if part == 'train' else 't10k'}-images-idx3-ubyte"
    places = [root / folder / (name + end) for folder in ("MNIST/raw", "raw", "") for end in ("", ".gz")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(f"{root} holds neither mnist.npz nor {name}[.gz], in MNIST/raw, raw or itself")
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            magic, count, height, width = struct.unpack(">4I", opened.read(16))
            size = count * height * width
            if magic != 0x803 or not 0 < size <= MAX_BYTES:
                raise DataError(f"{file}: its head is not that of pictures in bytes ({magic:#x}, {count} pictures)")
            data = opened.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if len(data) != size:
        raise DataError(f"{file} is cut short or too long: its head says {size} bytes of pixels")
    return np.frombuffer(data, np.uint8).reshape(count, height, width)


def _sklearn_digits(part: str) -> np.ndarray:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data=moving_mnist needs digits: set data.root to MNIST (a folder of torchvision or an .npz), or install "
            "scikit-learn for its small ones (pip install scikit-learn)"
        ) from error
    images = np.asarray(load_digits().images)
    order = rng.permutation(len(images), "moving mnist", "scikit-learn").numpy()
    count = round(SMALL_TEST * len(images))
    return (images[np.sort(order[:count] if part == "test" else order[count:])] * (255 / 16)).round().astype(np.uint8)


def _scaled(digits: np.ndarray, edge: int) -> np.ndarray:
    """uint8 (N, edge, edge)."""
    if digits.shape[1:] == (edge, edge):
        return digits
    pixels = torch.from_numpy(np.ascontiguousarray(digits))[:, None].float()
    small = F.interpolate(pixels, size=(edge, edge), mode="bilinear", antialias=True, align_corners=False)
    return small[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()
