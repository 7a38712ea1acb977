"""Joint embedding of pictures and sentences: trains a text encoder for text-to-image systems.

Reed et al., CVPR 2016 (arXiv:1605.05395); used by Reed et al., ICML 2016 (arXiv:1605.05396). The text side is a
char-CNN-RNN that reads one-hot characters, or a projection of given embeddings. The picture side is a small
convolutional network trained along, or frozen ImageNet features as in the paper. It makes no pictures; a finished
run is used as `text.encoder=char_cnn_rnn:runs/NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ConfigError, ShapeError
from condgen.losses.joint_embedding import in_batch_accuracy, info_nce, structured_joint_embedding
from condgen.nn.char_cnn_rnn import ALPHABET, CharCnnRnn
from condgen.nn.image_tower import ImageTower
from condgen.rng import StepRandom
from condgen.systems.base import Losses, Phase, Trainable
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec


class JointEmbedding(Trainable):
    """Scores s_ij = image_i . text_j, trained so that a picture's own sentence wins over those of other rows.

    text        "char_cnn_rnn" (needs text.encoder=char) or "projection" of pooled embeddings (two layers)
    shape       of the char-CNN-RNN: "icml" (HybridCNNLong, 512-wide GRU) or "cvpr" (HybridCNN, 256-wide RNN)
    text_width  width of its recurrence, or hidden width of the projection; 0 = as published (projection: dim)
    image       "convnet" trained along, or "efficientnet_lite0" features, frozen (an optional package)
    dim         width of the joint space. Frozen features keep their own width when dim equals it (1280), as
                Reed et al. keep GoogLeNet's 1024; otherwise a linear layer brings them to dim
    image_width, image_size   first width and input side in pixels of the convnet
    loss        "sje" (symmetric hinge with `margin`) or "info_nce" (with `temperature`)
    negatives   "rows": other rows, except those with the same sentence; "classes": rows of another label only

    The label serves `negatives` alone, and no other field of the condition is read.
    """

    consumes: ClassVar[tuple[str, ...]] = ("sequence", "vector")
    reads: ClassVar[tuple[str, ...] | None] = ("text", "label")
    requires: ClassVar[tuple[str, ...]] = ("text",)
    generates: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        text: Literal["char_cnn_rnn", "projection"] = "char_cnn_rnn",
        shape: Literal["icml", "cvpr"] = "icml",
        text_width: int = 0,
        text_dropout: float = 0.0,
        image: Literal["convnet", "efficientnet_lite0"] = "convnet",
        dim: int = 1024,
        image_width: int = 32,
        image_size: int = 64,
        loss: Literal["sje", "info_nce"] = "sje",
        margin: float = 1.0,
        temperature: float = 0.07,
        negatives: Literal["rows", "classes"] = "rows",
    ) -> None:
        super().__init__(condition=condition, target=target)
        if target.frames:
            raise ConfigError("joint_embedding embeds pictures, and this data set gives clips; set data.frames=0")
        if temperature <= 0 or margin <= 0:
            raise ConfigError(f"temperature={temperature} and margin={margin} must be above 0")
        if negatives == "classes" and condition.label is None:
            raise ConfigError("negatives=classes needs labels; use data with labels, or system.negatives=rows")
        self.reads_characters = _choice("text", text, ("char_cnn_rnn", "projection")) == "char_cnn_rnn"
        self.by_class = _choice("negatives", negatives, ("rows", "classes")) == "classes"
        self.loss_name = _choice("loss", loss, ("sje", "info_nce"))
        self.margin, self.temperature = margin, temperature
        self.text: nn.Module = self._text_side(condition, shape, text_width, dim, text_dropout)
        self._frozen: tuple[nn.Module, ...] = ()  # a tuple hides it from state_dict: its package carries the weights
        self.image: nn.Module
        if _choice("image", image, ("convnet", "efficientnet_lite0")) == "convnet":
            self.image = ImageTower(channels=target.channels, dim=dim, width=image_width, size=image_size)
        else:
            from condgen.nn.efficientnet_lite0 import DIM, EfficientNetLite0

            self._frozen = (EfficientNetLite0(),)
            self.image = nn.Identity() if dim == DIM else nn.Linear(DIM, dim)

    def _text_side(self, spec: ConditionSpec, shape: str, width: int, dim: int, dropout: float) -> nn.Module:
        text = spec.text
        if self.reads_characters:
            if text is None or text.tokens != len(ALPHABET):
                raise ConfigError(
                    "a char_cnn_rnn reads one-hot characters; set text.encoder=char, "
                    "or system.text=projection to train on the embeddings of another encoder"
                )
            kind: Literal["icml", "cvpr"] = "cvpr" if _choice("shape", shape, ("icml", "cvpr")) == "cvpr" else "icml"
            return CharCnnRnn(kind, embed_width=dim, cnn_width=width or None, dropout=dropout)
        if text is None or not text.pooled:
            raise ConfigError("system.text=projection needs pooled embeddings; set text.encoder=minilm or hash_bow")
        hidden = width or dim
        return nn.Sequential(nn.Linear(text.pooled, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))

    def phases(self) -> Sequence[Phase]:
        trains = ("text", "image") if any(True for _ in self.image.parameters()) else ("text",)
        return [Phase("embedding", self.embedding_loss, trains)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Float pictures (B, C, H, W) in [-1, 1] -> (B, dim), not normalised."""
        if self._frozen:
            with torch.no_grad():
                colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
                images = self._frozen[0].to(images.device)(colour.float())
        return self.image(images)

    def embed_texts(self, condition: Condition) -> Tensor:
        """(B, dim), not normalised. Raises ShapeError when the text was not encoded as this system needs it."""
        text = condition.text
        given = None if text is None else text.tokens if self.reads_characters else text.pooled
        if given is None:
            wanted = "characters (text.encoder=char)" if self.reads_characters else "pooled embeddings"
            raise ShapeError(f"this joint embedding needs text as {wanted}, which the condition lacks")
        return self.text(given)

    def embedding_loss(self, batch: Batch, random: StepRandom) -> Losses:
        if len(batch) < 2:
            raise ShapeError("a joint embedding compares rows with each other; use train.batch_size=2 or more")
        images, texts = self.embed_images(batch.target), self.embed_texts(batch.condition)
        ignore = self._same(batch.condition, images.device)
        if self.loss_name == "sje":
            loss = structured_joint_embedding(images, texts, margin=self.margin, ignore=ignore)
        else:
            loss = info_nce(images, texts, scale=1 / self.temperature, ignore=ignore)
        accuracy = in_batch_accuracy(self.scored(images.detach()), self.scored(texts.detach()))
        return {"loss": loss, "accuracy": accuracy}

    def scored(self, vectors: Tensor) -> Tensor:
        """Embeddings (B, dim) whose dot product is the score that the loss trains: a cosine for info_nce."""
        return F.normalize(vectors, dim=1) if self.loss_name == "info_nce" else vectors

    def _same(self, condition: Condition, device: torch.device) -> Tensor | None:
        """bool (B, B): pairs that are no negatives, being of one class or having one sentence."""
        if self.by_class and condition.label is not None and not condition.label.is_floating_point():
            ids = condition.label.to(device)
        elif condition.text is not None and condition.text.strings is not None:
            strings = condition.text.strings
            codes = {string: code for code, string in enumerate(dict.fromkeys(strings))}
            ids = torch.tensor([codes[string] for string in strings], device=device)
        else:
            return None
        return ids[:, None] == ids[None, :]


def _choice(option: str, given: str, allowed: tuple[str, ...]) -> str:
    if given not in allowed:
        raise ConfigError(f"system.{option}={given!r} does not exist; choose one of {', '.join(allowed)}")
    return given
