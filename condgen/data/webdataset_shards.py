"""WebDataset shards: tar files of pictures with a caption or a class beside each, read as a stream.

Files with the same name up to the first dot form one row: `000012.jpg`, `000012.txt`, `000012.cls`, `000012.json`.
Needs the extra `stream` (the webdataset library: its rules group files to rows and expand shard names).
Of that library neither the openers (`pipe:`, URLs) nor the decoders (pickle, torch.load) are used, so a shard
cannot run code, as with WDS_SECURE=1. `data.base.RowDataset` is the better choice wherever the data fit on a disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random as stdlib_random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from condgen import rng
from condgen.data._captions import clean
from condgen.data._view import Framing
from condgen.data.archive import Damaged, check_name, tar_members
from condgen.data.base import MAX_REPLACEMENTS, Loaded, Quarantined, StreamDataset, collate
from condgen.data.decode import decode_image
from condgen.errors import ConfigError, DataError
from condgen.specs import ConditionSpec, LabelSpec, TargetSpec, TextSpec
from condgen.types import Sample

log = logging.getLogger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp")
SUFFIXES = frozenset((*PICTURES, "json", "txt", "cls"))  # nothing else is ever decoded
MAX_JSON_BYTES = 2**20
MAX_SHARDS = 1_000_000
HASHED_BYTES = 2**16


@dataclass(frozen=True)
class Raw:
    """One undecoded row: its files by suffix, or the reason why there are none."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""


class WebdatasetShards(StreamDataset):
    """Local, uncompressed tar shards.

    root         folder of the shards
    split        shards are `root/SPLIT/*.tar`, or `root/SPLIT*.tar` where that folder is absent
    shards       other names below root instead: a glob or braces, such as "part-{000000..000099}.tar"
    captions     the row's `.txt`, or "caption" or "text" in its `.json`, becomes text; a row without it is refused
    num_classes  > 0: the row's `.cls`, or "label" in its `.json`, an integer below it, becomes the label
    shuffle      rows held back for shuffling (undecoded); 1 keeps the order of the shards
    rows         rows of an epoch over all processes; 0 counts them once, which reads every header
    load_size, resize, flip   see `condgen.data._view.Framing`
    """

    guarantee: ClassVar[str] = (
        "WebDataset stream: shard order is a function of (seed, epoch); rank r of W reads shards r, r+W, ... of that "
        "order through a shuffle buffer seeded by (seed, epoch, rank). Every epoch has the same number of steps on "
        "every rank; one whose shards run out early reads them again, and what is left over waits for another epoch. "
        "Resuming reads and skips from the start of the epoch: the same batches, but slowly. Unlike data sets on disk, "
        "batches depend on the number of processes, and rows are mixed only within the buffer."
    )

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        split: str = "train",
        shards: str = "",
        captions: bool = True,
        num_classes: int = 0,
        shuffle: int = 1000,
        rows: int = 0,
        load_size: int = 0,
        resize: str = "stretch",
        flip: bool = True,
    ) -> None:
        if shuffle < 1 or rows < 0 or num_classes < 0:
            raise ConfigError(f"data.shuffle={shuffle} must be >= 1, rows={rows} and num_classes={num_classes} >= 0")
        self.shards = find_shards(Path(root), split, shards)
        self.framing = Framing(size, load_size, resize, flip)
        self.with_captions, self.num_classes, self.shuffle = captions, num_classes, shuffle
        self._rows = rows or sum(count_rows(path) for path in self.shards)
        if not self._rows:
            raise DataError(f"the {len(self.shards)} shards below {root} hold no picture ({', '.join(PICTURES)})")
        self.target = TargetSpec(3, size, size)
        self.provides = ConditionSpec(
            label=LabelSpec(num_classes) if num_classes else None, text=TextSpec() if captions else None
        )

    def __len__(self) -> int:
        return self._rows

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and three blocks of each shard: hashing everything would read everything."""
        digest = hashlib.sha256()
        for path in self.shards:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\0".encode())
            with path.open("rb") as file:
                for place in (0, size // 2, max(0, size - HASHED_BYTES)):
                    file.seek(place)
                    digest.update(file.read(HASHED_BYTES))
        return digest.hexdigest()[:16]

    def steps_per_epoch(self, batch_size: int, world: int = 1) -> int:
        """The same on every rank, whatever its shards hold."""
        return max(1, self._rows // (batch_size * world))

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
        """See `StreamDataset.batches` and `guarantee`. Raises ConfigError for fewer shards than processes."""
        if len(self.shards) < world:
            raise ConfigError(
                f"{len(self.shards)} shards for {world} processes: each needs its own; write more and smaller shards"
            )
        log.info(self.guarantee)
        steps = self.steps_per_epoch(batch_size, world)
        current, window = -1, Window(iter(()))
        for number in itertools.count(start, step) if stop is None else range(start, stop, step):
            epoch, at = divmod(number, steps)
            if epoch != current:
                current, window = epoch, Window(self._epoch(seed, epoch, rank, world))
            window.skip_to(at * batch_size)
            yield self._load(window, at * batch_size, batch_size, spec, (seed, "augment", epoch, rank))

    def _load(
        self, window: Window, first: int, count: int, spec: ConditionSpec, parts: tuple[int | str, ...]
    ) -> Loaded:
        """Rows first .. first+count. In place of a bad row comes the next usable one, which keeps its own place too:
        so what a position holds never depends on decoding, and skipping need not decode."""
        samples: list[Sample] = []
        bad: list[Quarantined] = []
        for offset in range(count):
            for further in range(MAX_REPLACEMENTS):
                raw = window.peek(offset + further)
                try:
                    samples.append(self.sample(raw, rng.generator(*parts, first + offset)))
                    break
                except DataError as error:
                    bad.append(Quarantined(raw.key, str(error)))
                except Exception as error:
                    error.add_note(f"while reading row {raw.key}")
                    raise
            else:
                reasons = "; ".join(dict.fromkeys(q.reason for q in bad[-3:]))
                raise DataError(f"{MAX_REPLACEMENTS} rows in a row could not be read ({reasons})")
        return Loaded(collate(samples, spec), tuple(dict.fromkeys(bad)))

    def sample(self, raw: Raw, random: torch.Generator | None) -> Sample:
        """Decodes one row. Raises DataError with the reason."""
        if raw.reason:
            raise DataError(raw.reason)
        suffix = next((s for s in PICTURES if s in raw.files), None)
        if suffix is None:
            raise DataError(f"row {raw.key} has no picture ({', '.join(PICTURES)})")
        extra = parse_json(raw.files["json"], raw.key) if "json" in raw.files else {}
        caption = self._caption(raw, extra) if self.with_captions else None
        label = self._label(raw, extra) if self.num_classes else None
        view = self.framing.view(decode_image(raw.files[suffix], channels=3), random)
        return Sample(raw.key, view.pixels, label=label, caption=caption)

    def _caption(self, raw: Raw, extra: dict[str, Any]) -> str:
        if "txt" in raw.files:
            text = raw.files["txt"].decode("utf-8", errors="replace")
        else:
            text = extra.get("caption", extra.get("text", ""))
        caption = clean(text) if isinstance(text, str) else ""
        if not caption:
            raise DataError(f'row {raw.key} has no caption: neither a .txt nor "caption" in its .json')
        return caption

    def _label(self, raw: Raw, extra: dict[str, Any]) -> int:
        given: Any = (
            raw.files["cls"].decode("ascii", errors="replace").strip() if "cls" in raw.files else extra.get("label")
        )
        if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 10:
            given = int(given)
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < self.num_classes:
            raise DataError(f"row {raw.key}: label {given!r} must be an integer in 0..{self.num_classes - 1}")
        return given

    def _epoch(self, seed: int, epoch: int, rank: int, world: int) -> Iterator[Raw]:
        """This rank's rows of an epoch without end: shards are read again in another order when they run out."""
        order = rng.permutation(len(self.shards), seed, "shards", epoch).tolist()
        mine = [self.shards[i] for i in order[rank::world]]
        for again in itertools.count():
            turn = rng.permutation(len(mine), seed, "again", epoch, rank, again).tolist() if again else range(len(mine))
            rows = (raw for i in turn for raw in shard_rows(mine[i]))
            empty = True
            for raw in shuffled(rows, self.shuffle, rng.derive(seed, "shuffle", epoch, rank, again)):
                empty = False
                yield raw
            if empty:
                raise DataError(f"shards {', '.join(p.name for p in mine[:3])} of process {rank} hold no rows")


class Window:
    """A place in a stream of rows, with a look at what follows it."""

    def __init__(self, rows: Iterator[Raw]) -> None:
        self._rows, self._ahead, self._at = rows, deque[Raw](), 0

    def skip_to(self, position: int) -> None:
        while self._at < position:
            self._at += 1
            if self._ahead:
                self._ahead.popleft()
            else:
                next(self._rows)

    def peek(self, offset: int) -> Raw:
        while len(self._ahead) <= offset:
            self._ahead.append(next(self._rows))
        return self._ahead[offset]


def shuffled(rows: Iterator[Raw], size: int, seed: int) -> Iterator[Raw]:
    """Each row leaves a buffer of `size` rows at random. Own code: the library's may change between versions."""
    draw = stdlib_random.Random(seed)
    held: list[Raw] = []
    for row in rows:
        held.append(row)
        if len(held) >= size:
            at = draw.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    draw.shuffle(held)
    yield from held


def shard_rows(path: Path) -> Iterator[Raw]:
    """The rows of a shard, and one row with a reason for each thing that is wrong with it."""
    group_by_keys, _ = _library()
    problems: list[Raw] = []

    def files() -> Iterator[dict[str, Any]]:
        for member in tar_members(path):
            if isinstance(member, Damaged):
                problems.append(
                    Raw(f"{path.stem}/{member.name}", reason=f"{path.name}: {member.name}: {member.reason}")
                )
            else:
                yield {"fname": member.name, "data": member.data, "__url__": path.name}

    def record(error: Exception) -> bool:
        reason = str(error.args[0]) if error.args else repr(error)
        problems.append(Raw(f"{path.stem}/{reason.split(':')[0]}", reason=f"{path.name}: {reason}"))
        return True

    try:
        for sample in group_by_keys(files(), suffixes=SUFFIXES, handler=record):
            found = {suffix: sample[suffix] for suffix in sorted(SUFFIXES & sample.keys())}
            yield Raw(f"{path.stem}/{sample['__key__']}", found)
            yield from problems
            problems.clear()
    except DataError as error:
        problems.append(Raw(path.stem, reason=str(error)))
    yield from problems


def count_rows(path: Path) -> int:
    """Pictures of a shard, from its headers; 0 for a shard that cannot be read (its one row will say why)."""
    try:
        names = [m.name.lower() for m in tar_members(path, read=False) if not isinstance(m, Damaged)]
    except DataError:
        return 0
    split = [name.rsplit("/", 1)[-1].split(".", 1) for name in names]
    return sum(len(parts) == 2 and parts[1] in PICTURES for parts in split)


def find_shards(root: Path, split: str, pattern: str) -> list[Path]:
    """The shards, sorted by name. Raises ConfigError for URLs and pipes, DataError when there are none."""
    if "://" in f"{root}{pattern}" or ":/" in str(root) or str(root).startswith("pipe:") or pattern.startswith("pipe:"):
        raise ConfigError(
            f"data.root={root} shards={pattern!r}: shards are read from local folders only. URLs and pipe: commands "
            "would let a configuration run programs; copy or mount the shards first"
        )
    if pattern:
        _, braceexpand = _library()  # webdataset.shardlists.expand_urls would also read the environment
        names = itertools.islice(braceexpand(pattern), MAX_SHARDS)
        found = {path for name in names for path in root.glob(check_name(name))}
        looked = pattern
    else:
        found = set((root / split).glob("*.tar")) or set(root.glob(f"{split}*.tar"))
        looked = f"{split}/*.tar and {split}*.tar"
    if not found:
        raise DataError(f"no shards {looked} below {root}; set data.root, or data.shards to a pattern of their names")
    return sorted(found)


def parse_json(data: bytes, key: str) -> dict[str, Any]:
    """The row's JSON object. Raises DataError when it is too large, malformed or not an object."""
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"row {key}: its .json has {len(data)} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"row {key}: its .json cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"row {key}: its .json is a {type(value).__name__}, not an object")
    return value


def _library() -> tuple[Any, Any]:
    """(group_by_keys, braceexpand) of the webdataset library. Raises ConfigError when it is not installed."""
    try:
        from braceexpand import braceexpand
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise ConfigError("data=webdataset_shards needs the extra `stream`: pip install 'condgen[stream]'") from error
    return group_by_keys, braceexpand
