"""Text embeddings as a condition: pooled sentence vectors and token sequences.

Strings become embeddings in `text_encoders.py`, before a batch reaches a network.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from condgen.conditions._features import expect_size, masked_mean, null_sequence, null_vector, zero_rows
from condgen.conditions.base import ConditionKind, Feature
from condgen.conditions.label import replicate
from condgen.errors import ConfigError, ShapeError
from condgen.types import Condition, Text, TextSpec


class TextEmbedding(ConditionKind):
    """text -> vector (B, D): the pooled embedding, or the masked mean of the tokens; map replicates it;
    sequence (B, L, D) with the tokens' mask.

    Embeddings enter as the encoder made them: their magnitude matters to the 1024 -> 128 layer of
    GAN-CLS (Reed et al. 2016, arXiv:1605.05396), so nothing is normalised here.
    """

    field: ClassVar[str] = "text"
    forms: ClassVar[tuple[str, ...]] = ("vector", "map", "sequence")

    def __init__(self, spec: TextSpec, form: str, *, width: int | None = None, nullable: bool = False) -> None:
        super().__init__(spec, form, width=width, nullable=nullable)
        source = spec.tokens if form == "sequence" else spec.pooled or spec.tokens
        if not source:
            raise ConfigError(
                f"the text encoder {spec.encoder!r} gives no tokens; set text.tokens=true or choose another"
            )
        self.project = nn.Linear(source, width) if width else None
        self.width = width or source
        self.null = nn.Parameter(torch.zeros(self.width)) if nullable and form != "map" else None

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        text = condition.text
        assert text is not None
        if text.pooled is None and text.tokens is None:
            raise ShapeError(
                "the text of this condition was not encoded; use a TextEncoder, or condgen.load(...)(text=...)"
            )
        present = condition.is_present("text")
        if self.form == "sequence":
            return self._sequence(text, present)
        if text.pooled is not None and self.spec.pooled:
            expect_size("the width of text.pooled", text.pooled.shape[1], self.spec.pooled)
            given = present & (text.pooled != 0).any(1)
            vector = zero_rows(text.pooled, given)
        else:
            tokens, mask = self._tokens(text)
            given = present & mask.any(1)
            vector = masked_mean(tokens, mask & given[:, None])
        if self.project is not None:
            vector = self.project(vector)
        vector = null_vector(vector, given, self.null)
        return Feature(replicate(vector, size)) if self.form == "map" else Feature(vector)

    def _sequence(self, text: Text, present: Tensor) -> Feature:
        tokens, mask = self._tokens(text)
        mask = mask & present[:, None]
        tokens = torch.where(mask[..., None], tokens, torch.zeros_like(tokens))
        value = self.project(tokens) if self.project is not None else tokens
        return Feature(*null_sequence(value, mask, self.null))

    def _tokens(self, text: Text) -> tuple[Tensor, Tensor]:
        if text.tokens is None or text.mask is None:
            raise ShapeError("this system was built for token embeddings; the condition holds only pooled text")
        expect_size("the width of text.tokens", text.tokens.shape[2], self.spec.tokens)
        return text.tokens, text.mask
