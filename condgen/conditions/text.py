"""Text embeddings as a condition: pooled sentence vectors and token sequences.

Strings become embeddings in `text_encoders.py`, before a batch reaches a network.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from condgen.conditions.base import ConditionKind, Feature
from condgen.conditions.label import replicate
from condgen.errors import ConfigError, ShapeError
from condgen.types import Condition, TextSpec


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
            return self._sequence(text.tokens, text.mask, present)
        if text.pooled is not None and self.spec.pooled:
            vector = text.pooled
        else:
            if text.tokens is None or text.mask is None:
                raise ShapeError("this system was built for token embeddings; the condition holds only pooled text")
            weight = text.mask.to(text.tokens.dtype)[..., None]
            vector = (text.tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.project is not None:
            vector = self.project(vector)
        null = self.null if self.null is not None else torch.zeros((), device=vector.device)
        vector = torch.where(present[:, None], vector, null.to(vector.dtype))
        return Feature(replicate(vector, size)) if self.form == "map" else Feature(vector)

    def _sequence(self, tokens: torch.Tensor | None, mask: torch.Tensor | None, present: torch.Tensor) -> Feature:
        if tokens is None or mask is None:
            raise ShapeError("this system takes token embeddings; the condition holds only pooled text")
        value = self.project(tokens) if self.project is not None else tokens
        mask = mask & present[:, None]
        value = value * mask[..., None].to(value.dtype)  # what stands in padding can never matter
        if self.null is not None:
            # an empty row keeps one learned token, so that attention over it stays defined
            empty = ~mask.any(1)
            first = torch.where(empty[:, None], self.null.to(value.dtype), value[:, 0])
            value = torch.cat([first[:, None], value[:, 1:]], dim=1)
            mask = torch.cat([(mask[:, 0] | empty)[:, None], mask[:, 1:]], dim=1)
        return Feature(value, mask)
