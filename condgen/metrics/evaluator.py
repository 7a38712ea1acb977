"""The dual encoder that judges text adherence: trained on real pairs only, never seen by any generator.

Pictures and captions of the training split are embedded side by side with InfoNCE. It is small on purpose: half a
minute on one CPU core, and cached on disk, so that every later evaluation of the same data reuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import RowDataset
from condgen.errors import ConfigError, ShapeError
from condgen.losses.joint_embedding import info_nce
from condgen.metrics import fit, kept
from condgen.metrics.fit import MAX_ROWS
from condgen.nn.image_tower import ImageTower
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.types import Condition, Text

RECIPE = 1  # part of every cache key: a changed recipe is another evaluator


class TextSource(Protocol):
    """What the evaluator needs of a `CachedEncoder`."""

    def fill(self, strings: Sequence[str]) -> object: ...

    def attach(self, condition: Condition) -> Condition: ...


@dataclass(frozen=True)
class EvaluatorOptions:
    """The shape of an evaluator and how it is trained.

    size        side of the pictures it sees, in pixels
    text_noise  normal noise on text embeddings in training, in units of their standard deviation: without it a
                few thousand captions are learned by heart
    """

    steps: int = 400
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.05
    dim: int = 128
    width: int = 16
    size: int = 64
    hidden: int = 256
    dropout: float = 0.3
    text_noise: float = 0.6


class Evaluator(nn.Module):
    """Image tower and text tower into one space of unit vectors; compared by their dot product.

    text_dim is the width of the pooled text embedding. `about` says what it was trained on (JSON).
    """

    def __init__(self, options: EvaluatorOptions, *, channels: int, text_dim: int) -> None:
        super().__init__()
        self.options, self.channels, self.text_dim = options, channels, text_dim
        self.about: dict[str, Any] = {}
        self.image = ImageTower(
            channels=channels, dim=options.dim, width=options.width, size=options.size, dropout=options.dropout
        )
        self.text = nn.Sequential(
            nn.Linear(text_dim, options.hidden),
            nn.ReLU(),
            nn.Dropout(options.dropout),
            nn.Linear(options.hidden, options.dim),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @torch.no_grad()
    def embed_images(self, images: Tensor, *, batch_size: int = 128) -> Tensor:
        """uint8 or float [-1, 1] (N, C, H, W) -> unit vectors (N, dim) on the CPU.

        Pictures are rounded to 8 bits first, as if they had been saved. Independent of the batch size.
        """
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(
                f"pictures of shape {tuple(images.shape)}; this evaluator takes (N, {self.channels}, H, W)"
            )
        out = [self._image_features(part) for part in images.split(batch_size)]
        return torch.cat(out) if out else torch.empty(0, self.options.dim)

    @torch.no_grad()
    def embed_text(self, pooled: Tensor) -> Tensor:
        """Pooled text embeddings (N, text_dim) -> unit vectors (N, dim) on the CPU."""
        if pooled.dim() != 2 or pooled.shape[1] != self.text_dim:
            raise ShapeError(f"text of shape {tuple(pooled.shape)}; this evaluator takes (N, {self.text_dim})")
        was = self.training
        self.eval()
        out = F.normalize(self.text(pooled.to(self.log_scale.device).float()), dim=1).cpu()
        self.train(was)
        return out

    def _image_features(self, part: Tensor) -> Tensor:
        was = self.training
        self.eval()
        pixels = pixels_to_float(pixels_to_uint8(part)).to(self.log_scale.device)
        out = F.normalize(self.image(pixels), dim=1).cpu()
        self.train(was)
        return out

    @property
    def fingerprint(self) -> str:
        """Hash of every weight: two evaluators with the same one give the same numbers."""
        return kept.fingerprint(self)

    def save(self, folder: Path) -> None:
        """Writes `evaluator.safetensors` and `evaluator.json`; the folder appears at once or not at all."""
        about = {"options": asdict(self.options), "channels": self.channels, "text_dim": self.text_dim}
        kept.write(folder, "evaluator", self, {**about, "about": self.about})

    @staticmethod
    def load(folder: Path) -> Evaluator:
        """Reads what `save` wrote. Raises CheckpointError for missing, damaged or unfit files."""

        def make(about: Mapping[str, Any]) -> Evaluator:
            options = EvaluatorOptions(**about["options"])
            return Evaluator(options, channels=about["channels"], text_dim=about["text_dim"])

        made, about = kept.read(folder, "evaluator", make)
        made.about = about["about"]
        return made.eval()


def train_evaluator(
    dataset: RowDataset,
    encoder: TextSource,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: EvaluatorOptions | None = None,
) -> Evaluator:
    """An evaluator from the real (picture, caption) pairs of `dataset`, which must not be the split it will judge.

    The global random state is left as it was. Raises DataError for a data set without captions and ConfigError
    for an encoder without pooled vectors.
    """
    chosen = options or EvaluatorOptions()
    chosen = chosen if steps is None else EvaluatorOptions(**{**asdict(chosen), "steps": steps})
    images, captions = load_pairs(dataset, chosen.size, seed=seed)
    pooled = pooled_text(encoder, captions)
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(rng.derive(seed, "evaluator"))
        made = Evaluator(chosen, channels=images.shape[1], text_dim=pooled.shape[1]).to(device)
        _fit(made, images, pooled, captions, seed=seed)
    return made.eval()


def cached_evaluator(
    dataset: RowDataset,
    encoder: TextSource,
    folder: Path,
    *,
    about: dict[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: EvaluatorOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluator:
    """The evaluator under `folder` for this data, split, size, text encoder and recipe; trained when there is none.

    about: name and split of the data and name and fingerprint of the text encoder; part of the key. A damaged
    cache entry is trained again, with a line to `say`.
    """
    chosen = options or EvaluatorOptions()
    key: dict[str, Any] = {
        **about, "data_fingerprint": dataset.fingerprint, "rows": len(dataset), "channels": dataset.target.channels,
        "pixels": dataset.target.height, "seed": seed, "recipe": RECIPE, "options": asdict(chosen),
    }  # fmt: skip

    def train() -> Evaluator:
        made = train_evaluator(dataset, encoder, seed=seed, device=device, options=chosen)
        made.about = key
        return made

    return fit.cached(
        folder, "evaluator", key, load=lambda place: Evaluator.load(place).to(device), train=train, save=Evaluator.save,
        what=f"{len(dataset)} real pairs ({chosen.steps} steps)", say=say,
    )  # fmt: skip


def load_pairs(dataset: RowDataset, size: int, *, seed: int = 0, most: int = MAX_ROWS) -> tuple[Tensor, list[str]]:
    """uint8 pictures (N, C, size, size) and their captions, at most `most` rows drawn by seed.

    Rows without a caption or that cannot be read are left out. Raises DataError when too few remain.
    """
    return fit.readable(
        dataset, size, lambda row: row.caption or None, judge="evaluator", needs="captions", seed=seed, most=most
    )


def pooled_text(encoder: TextSource, captions: Sequence[str]) -> Tensor:
    """Pooled embeddings (N, D), float32 on the CPU. Raises ConfigError for an encoder that gives only tokens."""
    encoder.fill(list(captions))
    text = encoder.attach(Condition(text=Text(strings=tuple(captions)))).text
    if text is None or text.pooled is None:
        raise ConfigError(
            "the evaluator needs one vector per sentence; choose a text encoder such as minilm or hash_bow"
        )
    return text.pooled.float().cpu()


def _fit(evaluator: Evaluator, images: Tensor, pooled: Tensor, captions: list[str], *, seed: int) -> None:
    options, device = evaluator.options, evaluator.log_scale.device
    optimizer = torch.optim.AdamW(
        evaluator.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=max(2, options.steps), pct_start=0.1
    )
    codes = {caption: code for code, caption in enumerate(dict.fromkeys(captions))}
    identity = torch.tensor([codes[caption] for caption in captions])
    draws = rng.generator(seed, "evaluator batches")
    noise = options.text_noise * float(pooled.std())

    def loss(rows: Tensor) -> Tensor:
        pixels = fit.augment(pixels_to_float(images[rows]), draws).to(device)
        same = (identity[rows, None] == identity[None, rows]).to(device)
        words = pooled[rows] + noise * torch.randn(pooled[rows].shape, generator=draws)
        return info_nce(
            evaluator.image(pixels),
            evaluator.text(words.to(device)),
            scale=evaluator.log_scale.clamp(max=math.log(100.0)).exp(),
            ignore=same,
        )

    fit.fit(
        evaluator, len(images), loss, optimizer=optimizer, schedule=schedule,
        steps=options.steps, batch_size=options.batch_size, draws=draws,
    )  # fmt: skip
