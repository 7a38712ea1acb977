"""Tiny data set and text encoder for metric tests: a coloured square whose caption names colour and corner."""

import hashlib
from dataclasses import replace

import torch

from condgen.data.base import RowDataset
from condgen.errors import DataError
from condgen.types import Condition, ConditionSpec, Sample, TargetSpec, Text, TextSpec

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PLACES = {"top left": (0, 0), "top right": (0, 8), "bottom left": (8, 0), "bottom right": (8, 8)}


class Squares(RowDataset):
    """16 captions; row i draws caption i % 16 with a little noise of its own."""

    def __init__(self, rows=64, *, bad=(), captioned=True):
        self.rows, self.bad, self.captioned = rows, bad, captioned
        self.provides = ConditionSpec(text=TextSpec())
        self.target = TargetSpec(3, 16, 16)
        self.names = [f"{colour} {place}" for colour in COLOURS for place in PLACES]

    def __len__(self):
        return self.rows

    def key(self, index):
        return f"row{index}"

    def sample(self, index, random):
        if index in self.bad:
            raise DataError("this row is bad")
        caption = self.names[index % 16]
        colour, place = caption.split(" ", 1)
        y, x = PLACES[place]
        noise = torch.randint(40, (3, 16, 16), generator=torch.Generator().manual_seed(index))
        picture = noise.to(torch.uint8)
        picture[:, y + 1 : y + 7, x + 1 : x + 7] = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
        return Sample(self.key(index), picture, caption=caption if self.captioned else None)


class Words:
    """A bag of words hashed to 24 numbers, with the interface of CachedEncoder that metrics use."""

    def fill(self, strings):
        self.filled = len(strings)

    def vector(self, string):
        total = torch.zeros(24)
        for word in string.split():
            total[int(hashlib.sha256(word.encode()).hexdigest(), 16) % 24] += 1
        return total

    def attach(self, condition):
        pooled = torch.stack([self.vector(string) for string in condition.text.strings])
        return replace(condition, text=Text(pooled=pooled, strings=condition.text.strings))


class TokensOnly(Words):
    def attach(self, condition):
        size = len(condition)
        return Condition(text=Text(tokens=torch.zeros(size, 3, 4), mask=torch.ones(size, 3, dtype=torch.bool)))
