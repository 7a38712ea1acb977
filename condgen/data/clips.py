"""A folder of clips: videos, folders of frames, stacked frames, arrays; in class folders or with captions.

    root/train/..., root/test/...     split folders; without them a hash of the name splits
    root/[split/]metadata.jsonl       one JSON object a line: file_name, text | caption | captions, label, sha256
    root/[split/]CLASS/name.mp4       without a manifest: the folder is the label
    root/[split/]name.mp4 + name.txt  one caption a line
    root/[split/]CLASS/name/1.png     a folder of frames is one clip, in natural order
    root/[split/]name.jpg             frames below each other (VGAN): a column of at least two square frames
    root/[split/]name.npy             (T, N, H, W): N clips
    list=FILE                         one path below root a line, as VGAN's clips and UCF-101 came: only these
    root/[split/]name.actions.npy     (T, A) beside clip `name`: what was done at each of its frames; data.actions

What can be opened and what is refused is said in data/video.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from condgen.data import _actions, video
from condgen.data._classes import class_values
from condgen.data._clip_files import all_splits, clips_in
from condgen.data._manifest import SPLITS, Row
from condgen.data._windows import Known, by_count, by_time
from condgen.data.base import RowDataset
from condgen.data.cache import CachedArray, cache_folder
from condgen.data.decode import LUMA, RESIZE, cut, resize
from condgen.data.folder import choose_rows
from condgen.errors import ConfigError, DataError
from condgen.options import Range
from condgen.types import ConditionSpec, FramesSpec, LabelSpec, Sample, TargetSpec, TextSpec

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cached frames; raise it when what is kept changes
PROBED = 32  # clips opened to estimate the size of the cache


class Clips(RowDataset):
    """Clips of a folder as a data set; see the head of data/clips.py for the layout. A row is one clip.

    root       the folder
    size       pixels of a side of the square target
    split      "train", "val", "test" or "all". A missing test folder is served by val, and the other way round
    list       a text file, one path below root a line, that names the clips for training. Alone, `holdout` divides it
    test_list  one that names the clips of test and val; alone, the others of root are for training
    holdout    without split folders: share of the clips in test (and val), chosen by a hash of the name
    frames     T, frames of the target
    past       K > 0: the K frames before the target are the `frames` condition; 1 = video from a frame
    overlap    the target starts with the past frames instead of following them (VGAN's video from a frame)
    actions    "past": NAME.actions.npy beside each clip goes with the past frames; "future": also with the frames of
               the target, as entries after the past ones whose pixels repeat the newest: system.future_actions=true.
               Those of the frames that are taken: with stride > 1 none are summed. States are columns like any other
    stride     take every stride-th frame of the file
    fps        frames per second of the target, by time: also for clips of variable rate; 0 = the file's own, by count
    window     where the frames are taken in training: "random", "centre" or "first". Scores take the centre, or "first"
    short      a clip with too few frames is "refuse"d (quarantined), or its last frame is "repeat"ed, as VGAN does
    channels   3, or 1 = luma
    resize     "crop" (short side, then cut), "stretch" or "pad"
    load_size  training: resize to this first, then cut `size` at random, all frames at one place; 0 = size
    flip       mirror half of the training rows, all frames together
    captions   "one": a random one in training, the first otherwise; "mean": all, joined by newlines
    background 0..255 beside padded frames
    cache      decode each clip once and keep its resized frames, uint8, in the cache folder
    cache_gib  an estimate above this is refused before anything is written

    Target: uint8 (frames, channels, size, size). Raises DataError for a bad manifest and for a path that leaves root.
    """

    def __init__(
        self,
        *,
        root: str,
        size: Annotated[int, Range(1, 4096)] = 64,
        split: Literal["train", "val", "test", "all"] = "train",
        list: str | None = None,
        test_list: str | None = None,
        holdout: Annotated[float, Range(0, 0.99)] = 0.1,
        frames: Annotated[int, Range(1, 10_000)] = 16,
        past: Annotated[int, Range(0, 10_000)] = 0,
        overlap: bool = False,
        actions: Literal["none", "past", "future"] = "none",
        stride: Annotated[int, Range(1, 10_000)] = 1,
        fps: Annotated[float, Range(0, 1000)] = 0.0,
        window: Literal["random", "centre", "first"] = "random",
        short: Literal["refuse", "repeat"] = "refuse",
        channels: Literal[1, 3] = 3,
        resize: Literal["crop", "stretch", "pad"] = "crop",
        load_size: Annotated[int, Range(0, 4096)] = 0,
        flip: bool = False,
        captions: Literal["one", "mean"] = "one",
        background: Annotated[int, Range(0, 255)] = 255,
        cache: bool = False,
        cache_gib: Annotated[float, Range(0)] = 16.0,
    ) -> None:
        _check_options(locals())
        self.size, self.load_size, self.policy, self.background = size, load_size or size, resize, background
        self.frames, self.past, self.overlap = frames, past, overlap
        self.stride, self.fps, self.window, self.short = stride, fps, window, short
        self.actions = actions
        self.channels, self.flip, self.caption_use, self.cache = channels, flip, captions, cache
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.root={root!r} is not a folder")
        everything = all_splits(self.root, list, test_list)
        rows = choose_rows(everything, split, holdout)
        self.rows = [(row, number) for row in rows for number in range(clips_in(row))]
        known = [row for found in everything.values() for row in found]
        self.label_names = class_values("label", [row.label for row in known])
        self._label_index = {name: i for i, name in enumerate(self.label_names)}
        self._known: dict[int, Known] = {}
        self._checked: set[Path] = set()
        self.target = TargetSpec(channels, size, size, frames)
        self.provides = ConditionSpec(
            label=LabelSpec(len(self.label_names), tuple(map(str, self.label_names))) if self.label_names else None,
            text=TextSpec() if any(row.captions for row in known) else None,
            frames=self._frames_spec() if past else None,
        )
        if cache:
            self._state_cache(cache_gib)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """The path below root; with #N for clip N of an array."""
        row, number = self.rows[index]
        return f"{row.key}#{number}" if row.path.suffix.lower() == ".npy" else row.key

    def captions(self) -> list[str]:
        rows = [row for row, _ in self.rows if row.captions]
        if self.caption_use == "mean":
            return list(dict.fromkeys("\n".join(row.captions) for row in rows))
        return list(dict.fromkeys(text for row in rows for text in row.captions))

    @property
    def fingerprint(self) -> str:
        """Hash of every row's entry and of its file's size."""
        digest = hashlib.sha256()
        for row, number in self.rows:
            size = row.path.stat().st_size if row.path.is_file() else -1
            if self.actions != "none":
                told = _actions.beside(row.path)
                digest.update(f"{self.actions} {told.stat().st_size if told.is_file() else -1}".encode())
            digest.update(repr((replace(row, path=Path(), image=None, frames=()), number, size)).encode() + b"\0")
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        row, _ = self.rows[index]
        if row.problem:
            raise DataError(f"{row.key}: {row.problem}")
        draws = [0.5, 0.5, 0.5, 1.0, 0.0] if random is None else torch.rand(5, generator=random).tolist()
        where = {"random": draws[0], "centre": 0.5, "first": 0.0}[self.window]
        side = self.size if random is None else self.load_size
        picks = self._picks(index, where)
        frames = self._frames(index, picks, side)
        clip, _ = cut(frames, (self.size, self.size), (draws[1], draws[2]))
        clip = clip.flip(-1) if self.flip and draws[3] < 0.5 else clip
        start = 0 if self.overlap else self.past
        return Sample(
            key=self.key(index),
            target=clip[start : start + self.frames].contiguous(),
            label=None if row.label is None else self._label_index[row.label],
            caption=self._caption(row, draws[4]),
            frames=self._given(clip) if self.past else None,
            actions=None if self.actions == "none" else self._told(index, picks),
        )

    def verify(self, index: int) -> None:
        """Reads the whole clip: a window in the middle would not show that the end is missing."""
        known, count = self._learn(index), 0
        row, number = self.rows[index]
        for _ in video.read_frames(row.path, clip=number):
            count += 1
        if count != known.frames:
            raise DataError(f"{row.key}: {count} frames can be read, {known.frames} are declared")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}, "_checked": set()}

    # past frames and actions

    def _frames_spec(self) -> FramesSpec:
        side = (self.channels, self.size, self.size)
        if self.actions == "none":
            return FramesSpec(self.past, *side)
        width = _actions.width_of([row.path for row, _ in self.rows])
        return FramesSpec(self.past + (self.frames if self.actions == "future" else 0), *side, width)

    def _given(self, clip: Tensor) -> Tensor:
        """The past frames; their newest again for each action to come."""
        past = clip[: self.past]
        if self.actions == "future":
            past = torch.cat([past, past[-1:].expand(self.frames, -1, -1, -1)])
        return past.contiguous()

    def _told(self, index: int, picks: Sequence[int]) -> Tensor:
        row, number = self.rows[index]
        wanted = picks if self.actions == "future" else picks[: self.past]
        assert self.provides.frames is not None
        return _actions.read_actions(
            row.path, number, wanted, frames=self._learn(index).frames, width=self.provides.frames.actions
        )

    # which frames

    def _learn(self, index: int) -> Known:
        if index not in self._known:
            row, number = self.rows[index]
            self._check_hash(row)
            info = video.probe(row.path)
            times = video.frame_times(row.path)
            count = info.frames if times is None else len(times)
            if count is None:  # no other way than reading it
                count = sum(1 for _ in video.read_frames(row.path, clip=number))
            self._known[index] = Known(count, times, info.fps, info.height, info.width)
        return self._known[index]

    def _check_hash(self, row: Row) -> None:
        """Once in each process."""
        if row.sha256 and row.path not in self._checked:
            with row.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != row.sha256:
                    raise DataError(f"{row.key}: its sha256 is not the one in the manifest")
            self._checked.add(row.path)

    def _picks(self, index: int, where: float) -> list[int]:
        """Numbers of the frames to take, ascending; `where` in [0, 1] is the place of the window."""
        needed = self.frames + (0 if self.overlap else self.past)
        known, key, repeat = self._learn(index), self.key(index), self.short == "repeat"
        if self.fps:
            return by_time(known, needed, self.fps, where, repeat, key)
        return by_count(known, needed, self.stride, where, repeat, key)

    def _caption(self, row: Row, draw: float) -> str | None:
        if not row.captions:
            return None
        if self.caption_use == "mean":
            return "\n".join(row.captions)
        return row.captions[min(int(draw * len(row.captions)), len(row.captions) - 1)]

    # their pixels

    def _frames(self, index: int, picks: Sequence[int], side: int) -> Tensor:
        """uint8 (len(picks), channels, h, w), resized and not yet cut."""
        different = sorted(set(picks))
        if self.cache:
            found = torch.from_numpy(np.ascontiguousarray(self._cached(index, side).array[different]))
        else:
            row, number = self.rows[index]
            read = video.read_frames(row.path, at=different, clip=number)
            found = torch.stack([self._small(frame, side) for frame in read])
            if len(found) < len(different):
                raise DataError(f"{self.key(index)}: frame {different[len(found)]} is declared and cannot be read")
        order = {number: at for at, number in enumerate(different)}
        return found if len(different) == len(picks) else found[[order[number] for number in picks]]

    def _small(self, frame: Tensor, side: int) -> Tensor:
        if self.channels == 1:
            grey = (frame.float() * torch.tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
            frame = grey.round().clamp(0, 255).to(torch.uint8)
        return resize(frame, (side, side), self.policy, background=self.background)[0]

    def _shape(self, known: Known, side: int) -> tuple[int, int, int, int]:
        frame = torch.empty(self.channels, known.height, known.width, dtype=torch.uint8, device="meta")
        if self.policy == "crop":
            ratio = max(side / known.height, side / known.width)
            height, width = round(known.height * ratio), round(known.width * ratio)
            return known.frames, len(frame), max(height, side), max(width, side)
        return known.frames, len(frame), side, side

    def _cached(self, index: int, side: int) -> CachedArray:
        row, number = self.rows[index]
        known = self._learn(index)
        status = row.path.stat()
        parts = (
            FORMAT, str(row.path.absolute()), status.st_size, status.st_mtime_ns, number, side, self.policy,
            self.channels, self.background,
        )  # fmt: skip
        name = f"clips/{hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()}"
        shape = self._shape(known, side)

        def make() -> np.ndarray:
            kept = np.empty(shape, np.uint8)
            count = 0
            for frame in video.read_frames(row.path, clip=number):
                if count < len(kept):
                    kept[count] = self._small(frame, side).numpy()
                count += 1
            if count != len(kept):
                raise DataError(f"{row.key}: {count} frames can be read, {len(kept)} are declared")
            return kept

        return CachedArray(name, shape, make)

    def cache_bytes(self) -> int:
        """About how much the cache will hold for this split, from the first frames of a few clips."""
        sizes = []
        for index in range(0, len(self.rows), max(1, len(self.rows) // PROBED)):
            try:
                sizes.append(int(np.prod(self._shape(self._learn(index), self.load_size))))
            except (DataError, OSError):
                continue  # the loader will quarantine the row
        return round(sum(sizes) / max(1, len(sizes)) * len(self.rows))

    def _state_cache(self, most: float) -> None:
        need = self.cache_bytes() / 2**30
        if need > most:
            raise ConfigError(
                f"data.cache=true would keep about {need:.1f} GiB in {cache_folder()}; data.cache_gib={most:g} is the "
                "limit. Raise it, lower data.size or data.load_size, or leave the cache off"
            )
        logger.info("clips: decoded once into %s, about %.2f GiB for this split", cache_folder() / "clips", need)


# options and layout


def _check_options(given: dict[str, Any]) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "split": (*SPLITS, "all"), "window": ("random", "centre", "first"), "short": ("refuse", "repeat"),
        "channels": (1, 3), "actions": ("none", "past", "future"), "resize": RESIZE, "captions": ("one", "mean"),
    }  # fmt: skip
    for name, choices in allowed.items():
        if given[name] not in choices:
            raise ConfigError(f"data.{name}={given[name]!r}: choose one of {', '.join(map(str, choices))}")
    for name, low in (("size", 1), ("frames", 1), ("past", 0), ("stride", 1), ("fps", 0)):
        if not given[name] >= low:
            raise ConfigError(f"data.{name}={given[name]!r} must be at least {low}")
    if given["load_size"] and given["load_size"] < given["size"]:
        raise ConfigError(
            f"data.load_size={given['load_size']} is smaller than data.size={given['size']}; 0 = the same"
        )
    if given["overlap"] and not 1 <= given["past"] <= given["frames"]:
        raise ConfigError(
            f"data.overlap=true needs 1 <= data.past <= data.frames; they are {given['past']} and {given['frames']}"
        )
    told = given["actions"]
    if told != "none" and (not given["past"] or given["flip"] or (told == "future" and given["overlap"])):
        raise ConfigError(
            f"data.actions={told} needs data.past, and data.flip=false: a mirrored clip would need other actions. "
            "future also needs data.overlap=false"
        )
    if given["fps"] and given["stride"] != 1:
        raise ConfigError(f"data.fps={given['fps']} and data.stride={given['stride']} exclude each other; set one")
