"""Embeds each caption once: a table in memory over shards on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from condgen.conditions._captions import split_captions
from condgen.conditions._text_base import TextEncoder, average_rows
from condgen.data.cache import cache_folder
from condgen.errors import DataError
from condgen.types import Condition, Text, TextSpec

SHARD_CAPTIONS = 2048  # captions embedded between two writes: what an interruption can lose
HALF_LIMIT = 6e4  # float16 ends at 65504
FORMAT = 1


def default_folder() -> Path:
    """CONDGEN_CACHE/text, or ~/.cache/condgen/text."""
    return cache_folder() / "text"


class CachedEncoder:
    """A `TextEncoder` with a memory.

    Embeddings live in memory and, as float16, in `folder`/<encoder>-<fingerprint>/. They are rounded to float16 at
    once, so a run sees the same numbers whether or not the disk already held them. Shards are written to a temporary
    file and renamed; a shard that cannot be verified is deleted with a warning and its captions are embedded again.
    Several processes may share a folder: at worst two of them embed the same captions. Where the folder cannot be
    written, a warning says so once and the memory alone is used.

    folder   root of the cache; None = the default folder
    disk     False keeps everything in memory
    """

    def __init__(self, encoder: TextEncoder, folder: Path | str | None = None, *, disk: bool = True) -> None:
        self.encoder = encoder
        label = re.sub(r"[^A-Za-z0-9]+", "-", encoder.name).strip("-")[-40:] or "encoder"
        root = Path(folder) if folder is not None else default_folder()
        self.folder = root / f"{label}-{encoder.fingerprint[:16]}"
        self._disk = disk and not encoder.cheap
        self._read: set[str] = set()
        self._place: dict[str, int] = {}
        self._pooled = torch.zeros(0, encoder.spec.pooled)
        self._tokens: list[Tensor] = []
        self._unsaved: list[str] = []

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def spec(self) -> TextSpec:
        return self.encoder.spec

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint

    def __len__(self) -> int:
        """Captions in memory."""
        return len(self._place)

    # filling

    def fill(self, strings: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Embeds every caption of `strings` that neither the memory nor the disk holds, and saves it.

        progress   called with (done, total) captions after each shard
        """
        if self.encoder.cheap:
            return
        wanted = dict.fromkeys(caption for string in strings for caption in split_captions(string))
        missing = self._missing(wanted)
        for start in range(0, len(missing), SHARD_CAPTIONS):
            self._embed(missing[start : start + SHARD_CAPTIONS])
            self.flush()
            if progress is not None:
                progress(min(start + SHARD_CAPTIONS, len(missing)), len(missing))
        self.flush()

    def flush(self) -> None:
        """Writes the captions that are not on disk yet."""
        captions, self._unsaved = self._unsaved, []
        if captions and self._disk:
            self._write(captions)

    def _missing(self, captions: Iterable[str]) -> list[str]:
        missing = [caption for caption in captions if caption not in self._place]
        if missing and self._disk:
            self._read_shards()
            missing = [caption for caption in missing if caption not in self._place]
        return missing

    def _embed(self, captions: Sequence[str]) -> None:
        text = self.encoder.encode_captions(captions)
        rows = None
        if text.tokens is not None and text.mask is not None:
            rows = [_storable(tokens[mask]) for tokens, mask in zip(text.tokens, text.mask, strict=True)]
        self._add(captions, None if text.pooled is None else _storable(text.pooled), rows)
        self._unsaved.extend(captions)

    def _add(self, captions: Sequence[str], pooled: Tensor | None, tokens: Sequence[Tensor] | None) -> None:
        new = [at for at, caption in enumerate(captions) if caption not in self._place]
        for at in new:
            self._place[captions[at]] = len(self._place)
        if pooled is not None:
            used = len(self._place)
            if used > len(self._pooled):  # grows by doubling, so that many small additions stay cheap
                grown = torch.zeros(max(used, 2 * len(self._pooled)), self.spec.pooled)
                grown[: len(self._pooled)] = self._pooled
                self._pooled = grown
            self._pooled[used - len(new) : used] = pooled[new].float()
        if tokens is not None:
            self._tokens.extend(tokens[at] for at in new)

    # reading out

    def encode(self, strings: Sequence[str]) -> Text:
        """As `TextEncoder.encode`, from the cache where it can. Captions new to it are saved once enough came."""
        if self.encoder.cheap:
            return self.encoder.encode(strings)
        rows = [split_captions(string) for string in strings]
        missing = self._missing(dict.fromkeys(caption for row in rows for caption in row))
        if missing:
            self._embed(missing)
            if len(self._unsaved) >= SHARD_CAPTIONS:
                self.flush()
        at = [[self._place[caption] for caption in row] for row in rows]
        pooled = average_rows(self._pooled, at) if self.spec.pooled else None
        if not self.spec.tokens:
            return Text(pooled, strings=tuple(strings))
        tokens = torch.zeros(len(rows), self.spec.length, self.spec.tokens)
        mask = torch.zeros(len(rows), self.spec.length, dtype=torch.bool)
        for row, places in enumerate(at):
            found = self._tokens[places[0]]
            tokens[row, : len(found)] = found.float()
            mask[row, : len(found)] = True
        return Text(pooled, tokens, mask, strings=tuple(strings))

    def attach(self, condition: Condition) -> Condition:
        """Fills text.pooled, text.tokens and text.mask from text.strings, on the CPU; rows not present stay null.

        A condition without text, or whose text has embeddings but no strings, is returned as it is.
        """
        text = condition.text
        if text is None:
            return condition
        if text.strings is None:
            if text.pooled is None and text.tokens is None:
                raise DataError("the text of this condition has neither strings nor embeddings; give Text(strings=...)")
            return condition
        encoded = self.encode(text.strings)
        if "text" in condition.present:
            encoded = encoded.where(condition.present["text"].cpu(), encoded.null_like())
        return replace(condition, text=encoded)

    # the disk

    def _write(self, captions: Sequence[str]) -> None:
        rows = [self._place[caption] for caption in captions]
        joined = torch.tensor(list("\n".join(captions).encode()), dtype=torch.uint8)
        tensors = {"captions": joined}
        if self.spec.pooled:
            tensors["pooled"] = _storable(self._pooled[rows])
        if self.spec.tokens:
            parts = [self._tokens[row] for row in rows]
            tensors["counts"] = torch.tensor([len(part) for part in parts])
            tensors["tokens"] = torch.cat(parts)
        data = save(tensors)
        checked = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest()}).encode() + b"\n" + data
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.captions"
        try:
            _write_atomically(self.folder / name, checked)
        except OSError as error:
            self._disk = False
            warnings.warn(f"text embeddings are kept in memory only: cannot write {self.folder}: {error}", stacklevel=2)
        self._read.add(name)

    def _read_shards(self) -> None:
        for path in sorted(self.folder.glob("*.captions")) if self.folder.is_dir() else []:
            if path.name in self._read:
                continue
            self._read.add(path.name)
            try:
                captions, pooled, tokens = self._parse(path.read_bytes())
            except FileNotFoundError:
                continue  # another process found it damaged first
            except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
                warnings.warn(f"the text cache {path} is damaged and is built again ({error})", stacklevel=2)
                path.unlink(missing_ok=True)
                continue
            self._add(captions, pooled, tokens)

    def _parse(self, data: bytes) -> tuple[list[str], Tensor | None, list[Tensor] | None]:
        """The captions and embeddings of one shard. Raises ValueError unless the shard is whole and fits the spec."""
        head, _, body = data.partition(b"\n")
        header = json.loads(head)
        if header["format"] != FORMAT or header["sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("checksum or format differs")
        tensors = load(body)
        captions = tensors["captions"].numpy().tobytes().decode().split("\n")
        pooled = tensors["pooled"] if self.spec.pooled else None
        tokens = None
        if self.spec.tokens:
            tokens = list(tensors["tokens"].split(tensors["counts"].tolist()))
        rows = {len(captions)} | ({len(pooled)} if pooled is not None else set())
        rows |= {len(tokens)} if tokens is not None else set()
        if len(rows) != 1:
            raise ValueError(f"its parts have different numbers of captions: {sorted(rows)}")
        return captions, pooled, tokens


def _storable(values: Tensor) -> Tensor:
    """Rounded to what the disk will hold: float16, or float32 where float16 would overflow."""
    return values.half() if not values.numel() or float(values.abs().max()) < HALF_LIMIT else values.float()


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
