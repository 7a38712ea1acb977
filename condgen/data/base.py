"""What every data set implements, and how its rows become batches.

The batch number is the whole state of the loader: batch g holds positions g*B .. (g+1)*B of an endless
stream, epoch e of that stream is a permutation of the rows that depends on (seed, e) alone, and a row's
augmentation depends on (seed, e, row). So resuming needs one integer, and the number of workers, which may be
0, never changes what a batch holds.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from condgen import rng
from condgen.errors import DataError
from condgen.options import timeout_seconds
from condgen.pixels import expect_pixels
from condgen.types import Batch, Boxes, Condition, ConditionSpec, Frames, Image, Keypoints, Sample, TargetSpec, Text

MAX_REPLACEMENTS = 100  # tries to find a good row in place of a bad one
MAX_BAD_SHARE = 0.01
MAX_BAD_ROWS = 100


class DataSource(ABC):
    """What every data set has. The file `data/<name>.py` holds one subclass of RowDataset or StreamDataset.

    The constructor is keyword-only; its signature is the schema of `data.*` in the configuration. Every
    subclass takes `root`, `size` and `split` ("train", "val" or "test"), plus what its layout needs.

    provides      the condition fields every row may carry; text widths are filled in by the text encoder
    target        what is generated
    attribution   the licence line that pictures and reports made from it must carry, or ""
    """

    provides: ConditionSpec
    target: TargetSpec
    attribution: ClassVar[str] = ""

    @abstractmethod
    def __len__(self) -> int:
        """Rows of this split, which one epoch reads."""

    def captions(self) -> list[str]:
        """Every distinct caption that a row can carry, so that they are embedded once.

        A row may join several by newlines; they are listed one by one where there are too many combinations.
        Empty where they are not known before reading.
        """
        return []

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the data change."""


class RowDataset(DataSource):
    """A data set with random access to rows."""

    @abstractmethod
    def key(self, index: int) -> str:
        """A stable, unique id of row `index`."""

    @abstractmethod
    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        """Row `index`. `random` drives augmentation; None = the row as it is, for scores.

        Raises DataError (with the reason) for a row that cannot be used; the loader then quarantines it.
        """

    def verify(self, index: int) -> None:
        """Reads what `sample` leaves out of row `index`, such as the rest of a clip. Raises DataError.

        For `condgen check-data`, never in training.
        """
        return None

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest: changes when the data change."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.key(index).encode() + b"\0")
        return digest.hexdigest()[:16]


class StreamDataset(DataSource):
    """A data set that can only be read in order: shards too large for random access. Scores need a RowDataset.

    guarantee     one paragraph on order, epochs and resume, for the log
    """

    guarantee: ClassVar[str]

    @abstractmethod
    def batches(
        self,
        start: int,
        stop: int | None = None,
        step: int = 1,
        *,
        spec: ConditionSpec,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Loaded]:
        """Batches start, start+step, ... below stop (None = without end) of this rank, a function of the arguments."""


def expect_row(data: DataSource, sample: Sample) -> None:
    """Sizes and pixel values of one row are those that the data set promises. Raises DataError (ShapeError).

    uint8 costs nothing; float pixels are read once. A picture of another size or a float one in 0..255 would
    broadcast or train, and nobody would know.
    """
    spec, target = data.provides, data.target.shape
    image = (spec.image.channels, spec.image.height, spec.image.width) if spec.image else None
    past = (spec.frames.frames, spec.frames.channels, spec.frames.height, spec.frames.width) if spec.frames else None
    for name, value, shape in (
        ("target", sample.target, target), ("image", sample.image, image), ("frames", sample.frames, past),
    ):  # fmt: skip
        if value is None or shape is None:
            continue
        if tuple(value.shape) != shape:
            raise DataError(f"{name} has shape {tuple(value.shape)}; the data set says {shape}")
        expect_pixels(name, value)


def collate(samples: Sequence[Sample], spec: ConditionSpec) -> Batch:
    """Stacks samples; pads boxes to spec.boxes.max_boxes; a field that a row lacks is null and not present.

    Only the fields of `spec` become part of the condition. Raises DataError naming the row.
    """
    condition: dict[str, Any] = {}
    present: dict[str, Tensor] = {}

    def column(name: str, field: str) -> list[Any]:
        values = [getattr(s, name) for s in samples]
        if any(v is None for v in values):
            present[field] = torch.tensor([v is not None for v in values])
        return values

    if spec.label is not None:
        labels = column("label", "label")
        for s in samples:
            if s.label is not None and not (isinstance(s.label, int) and 0 <= s.label < spec.label.num_classes):
                raise DataError(f"row {s.key}: label {s.label!r} must be an integer in 0..{spec.label.num_classes - 1}")
        condition["label"] = torch.tensor([-1 if v is None else v for v in labels], dtype=torch.int64)
    if spec.text is not None:
        condition["text"] = Text(strings=tuple(v or "" for v in column("caption", "text")))
    if spec.boxes is not None:
        column("boxes", "boxes")
        condition["boxes"] = _pad_boxes(samples, spec.boxes.max_boxes, spec.boxes.num_classes > 0)
    if spec.keypoints is not None:
        points = spec.keypoints.num_points
        values = column("keypoints", "keypoints")
        visible = [s.visible for s in samples]
        condition["keypoints"] = Keypoints(
            torch.stack([torch.zeros(points, 2) if v is None else v for v in values]),
            torch.stack([torch.zeros(points, dtype=torch.bool) if v is None else v for v in visible]),
        )
    if spec.image is not None:
        pixels = _stack(samples, column("image", "image"), "image")
        masks = [s.image_mask for s in samples]
        condition["image"] = Image(pixels, _stack(samples, masks, "image_mask") if spec.image.mask else None)
    if spec.frames is not None:
        values = column("frames", "frames")
        pixels = _stack(samples, values, "frames")
        given = torch.tensor([v is not None for v in values])[:, None].expand(-1, pixels.shape[1])
        actions = _stack(samples, [s.actions for s in samples], "actions") if spec.frames.actions else None
        condition["frames"] = Frames(pixels, given.clone(), actions)
    target = _stack(samples, [s.target for s in samples], "target")
    names = samples[0].truth.keys()
    truth = {name: torch.stack([s.truth[name] for s in samples]) for name in names}
    return Batch(target, Condition(**condition, present=present), tuple(s.key for s in samples), truth)


@dataclass(frozen=True)
class Quarantined:
    """A row that could not be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What the loader yields: a batch and the rows that were replaced while making it."""

    batch: Batch
    quarantined: tuple[Quarantined, ...] = ()

    def pin_memory(self) -> Loaded:
        return replace(self, batch=self.batch.pin_memory())


class BatchDataset(Dataset[Loaded]):
    """Batch g of rank r: rows of the global batch, a function of (seed, g) alone.

    Row order inside the global batch does not depend on the number of processes: rank r of W holds rows
    r*B .. (r+1)*B of the W*B rows of global batch g.
    """

    def __init__(
        self, data: RowDataset, spec: ConditionSpec, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if len(data) == 0:
            raise DataError("the data set is empty; check data.root and the split, or run `condgen check-data`")
        self.data, self.spec, self.batch_size, self.seed = data, spec, batch_size, seed
        self.rank, self.world = rank, world
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def row(self, position: int) -> tuple[int, int]:
        """(epoch, row index) at a position of the endless stream."""
        epoch, at = divmod(position, len(self.data))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, rng.permutation(len(self.data), self.seed, "epoch", epoch)
        return epoch, int(self._order[at])

    def __getitem__(self, number: int) -> Loaded:
        samples, bad = [], []
        for position in self._positions(number):
            sample, skipped = self._good(position)
            samples.append(sample)
            bad.extend(skipped)
        return Loaded(collate(samples, self.spec), tuple(bad))

    def _positions(self, number: int) -> range:
        start = (number * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def keys(self, number: int) -> list[str]:
        """The ids of the rows of batch `number`, without reading them; a bad one would be replaced."""
        return [self.data.key(self.row(position)[1]) for position in self._positions(number)]

    def _good(self, position: int) -> tuple[Sample, list[Quarantined]]:
        """The row at `position`, or the next usable one of the permutation: deterministic, so resume stays exact."""
        bad: list[Quarantined] = []
        for step in range(MAX_REPLACEMENTS):
            epoch, index = self.row(position + step)
            try:
                random = rng.generator(self.seed, "augment", epoch, index)
                sample = self.data.sample(index, random)
                expect_row(self.data, sample)
                return sample, bad
            except DataError as error:
                bad.append(Quarantined(self.data.key(index), str(error)))
            except Exception as error:
                error.add_note(f"while reading row {self.data.key(index)} of {type(self.data).__name__}")
                raise
        reasons = "; ".join(dict.fromkeys(q.reason for q in bad[:3]))
        raise DataError(f"{MAX_REPLACEMENTS} rows in a row could not be read ({reasons}). Run `condgen check-data`")


class StreamBatches(Dataset[Loaded]):
    """Batch g of rank r of a `StreamDataset`, with the interface of `BatchDataset`.

    Batches asked for in order are read on; any other number starts the stream again and skips, which is exact but
    slow. With W loader workers each reads the whole stream of its rank and decodes every W-th batch.
    """

    def __init__(
        self, data: StreamDataset, spec: ConditionSpec, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.data, self.spec, self.batch_size, self.seed = data, spec, batch_size, seed
        self.rank, self.world = rank, world
        self._next, self._batches = -1, iter(())  # type: tuple[int, Iterator[Loaded]]

    def __getitem__(self, number: int) -> Loaded:
        worker = get_worker_info()
        step = worker.num_workers if worker is not None else 1
        if number != self._next:
            self._batches = self.data.batches(
                number, None, step, spec=self.spec, batch_size=self.batch_size, seed=self.seed, rank=self.rank,
                world=self.world,
            )  # fmt: skip
        self._next = number + step
        return next(self._batches)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": -1, "_batches": iter(())}  # an open stream cannot travel to a worker


def batched(
    data: DataSource, spec: ConditionSpec, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> BatchDataset | StreamBatches:
    """The batches of any data set by number, for `batches`."""
    if isinstance(data, StreamDataset):
        return StreamBatches(data, spec, batch_size=batch_size, seed=seed, rank=rank, world=world)
    if isinstance(data, RowDataset):
        return BatchDataset(data, spec, batch_size=batch_size, seed=seed, rank=rank, world=world)
    raise TypeError(f"{type(data).__name__} is neither a RowDataset nor a StreamDataset")


class Counter:
    """The batch numbers start, start+1, ... that the DataLoader hands to its workers."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


def batches(
    data: BatchDataset | StreamBatches, *, start: int, stop: int, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Loaded]:
    """A DataLoader over batch numbers start..stop in order, whatever the number of workers.

    A worker that gives no batch for `options.timeout_seconds` is an error (RuntimeError), not a wait without end.
    """
    return DataLoader(
        data,
        batch_size=None,
        sampler=Counter(start, stop),
        num_workers=workers,
        timeout=timeout_seconds() if workers else 0,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
        # the loader draws a seed for its workers from the global generator when none is given
        generator=rng.generator(data.seed, "loader"),
    )


def too_many_bad(bad: int, rows: int) -> bool:
    """More than 1 % of the rows or 100 rows, whichever is larger."""
    return bad > max(MAX_BAD_ROWS, MAX_BAD_SHARE * rows) or bad >= rows


def _stack(samples: Sequence[Sample], values: Sequence[Tensor | None], name: str) -> Tensor:
    model = next((v for v in values if v is not None), None)
    if model is None:
        raise DataError(f"no row of this batch has {name}; the data set says that it provides it")
    for sample, value in zip(samples, values, strict=True):
        if value is not None and value.shape != model.shape:
            raise DataError(
                f"row {sample.key}: {name} has shape {tuple(value.shape)} where others have {tuple(model.shape)}"
            )
        if value is not None and value.dtype != model.dtype:
            # stacking would promote uint8 to float and leave it in 0..255
            raise DataError(f"row {sample.key}: {name} has dtype {value.dtype} where others have {model.dtype}")
    return torch.stack([torch.zeros_like(model) if v is None else v for v in values])


def _pad_boxes(samples: Sequence[Sample], most: int, labelled: bool) -> Boxes:
    xyxy = torch.zeros(len(samples), most, 4)
    valid = torch.zeros(len(samples), most, dtype=torch.bool)
    label = torch.zeros(len(samples), most, dtype=torch.int64)
    for row, sample in enumerate(samples):
        if sample.boxes is None or len(sample.boxes) == 0:
            continue
        count = min(len(sample.boxes), most)
        xyxy[row, :count] = sample.boxes[:count]
        valid[row, :count] = True
        if sample.box_labels is not None:
            label[row, :count] = sample.box_labels[:count]
    return Boxes(xyxy, valid, label if labelled else None)
