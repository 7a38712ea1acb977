"""What every text encoder implements. See `text_encoders`."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from condgen.conditions._captions import split_captions
from condgen.types import Text, TextSpec


class TextEncoder(ABC):
    """A frozen map from strings to `Text`.

    name          what the configuration called it
    spec          widths of what `encode` returns
    cheap         computing costs less than looking up, so nothing is cached
    """

    name: str
    spec: TextSpec
    cheap: ClassVar[bool] = False

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the embedding: weights, tokeniser, pooling, lengths."""

    @abstractmethod
    def encode_captions(self, captions: Sequence[str]) -> Text:
        """One row per clean caption, float32 on the CPU; tokens are padded to spec.length."""

    def encode(self, strings: Sequence[str]) -> Text:
        """Embeds each string, float32 on the CPU.

        A string may hold several captions joined by newlines: `pooled` is then the mean of their embeddings, as in
        Reed et al. 2016 (not normalised again), and tokens are those of the first caption. Any string is accepted;
        `clean_caption` says how.
        """
        rows = [split_captions(string) for string in strings]
        captions = list(dict.fromkeys(caption for row in rows for caption in row))
        place = {caption: index for index, caption in enumerate(captions)}
        table = self.encode_captions(captions)
        at = [[place[caption] for caption in row] for row in rows]
        first = torch.tensor([row[0] for row in at], dtype=torch.int64)
        return Text(
            pooled=None if table.pooled is None else average_rows(table.pooled, at),
            tokens=None if table.tokens is None else table.tokens[first],
            mask=None if table.mask is None else table.mask[first],
            strings=tuple(strings),
        )


def average_rows(table: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """float32 (B, D): the mean of table[rows[i]] for each i."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    flat = torch.tensor([index for row in rows for index in row], dtype=torch.int64)
    into = torch.arange(len(rows)).repeat_interleave(counts)
    total = torch.zeros(len(rows), table.shape[1]).index_add_(0, into, table[flat].to(torch.float32))
    return total / counts[:, None]


def digest(*parts: object) -> str:
    """Hash of values that JSON can hold, for fingerprints."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, computed once per process and version of the file."""
    status = path.stat()
    return _file_digest(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
