"""The classifier that judges class adherence: trained on real pictures only, never seen by any generator.

Kept on disk like the evaluator. `class_scores` asks it about samples; `cas_scores` turns it round (Ravuri and
Vinyals 2019, arXiv:1905.10887): train on samples, test on real pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import RowDataset
from condgen.errors import DataError, ShapeError
from condgen.metrics import fit, kept
from condgen.metrics.fit import MAX_ROWS
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.nn.image_tower import ImageTower, resize
from condgen.pixels import pixels_to_float, pixels_to_uint8

RECIPE = 1  # part of every cache key: a changed recipe is another classifier
STEM = "classifier"


@dataclass(frozen=True)
class ClassifierOptions:
    """The shape of a classifier and how it is trained. size: side of the pictures it sees, in pixels."""

    steps: int = 400
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    width: int = 16
    size: int = 32
    dropout: float = 0.3


class Classifier(nn.Module):
    """Pictures of any size -> logits of `classes`. `about` says what it was trained on (JSON)."""

    def __init__(self, options: ClassifierOptions, *, channels: int, classes: int) -> None:
        super().__init__()
        self.options, self.channels, self.classes = options, channels, classes
        self.about: dict[str, Any] = {}
        self.tower = ImageTower(
            channels=channels, dim=classes, width=options.width, size=options.size, dropout=options.dropout
        )

    def forward(self, images: Tensor) -> Tensor:
        """float (B, channels, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.tower(images)

    @torch.no_grad()
    def predict(self, images: Tensor, *, batch_size: int = 128) -> Tensor:
        """uint8 or float [-1, 1] (N, C, H, W) -> class numbers (N,) on the CPU, of pictures rounded to 8 bits."""
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(
                f"pictures of shape {tuple(images.shape)}; this classifier takes (N, {self.channels}, H, W)"
            )
        was, device = self.training, next(self.parameters()).device
        self.eval()
        parts = [self(pixels_to_float(pixels_to_uint8(x)).to(device)).argmax(1).cpu() for x in images.split(batch_size)]
        self.train(was)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of pictures that are given their label (N,)."""
        return float((self.predict(images) == labels.cpu()).double().mean())

    @property
    def fingerprint(self) -> str:
        """Hash of every weight: two classifiers with the same one give the same numbers."""
        return kept.fingerprint(self)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: ClassifierOptions | None = None,
) -> Classifier:
    """A classifier of uint8 or float [-1, 1] pictures (N, C, H, W) with labels (N,); a function of the arguments.

    The global random state is left as it was. Raises DataError below 2 pictures.
    """
    chosen = options or ClassifierOptions()
    if len(images) < 2 or len(images) != len(labels):
        raise DataError(f"a classifier needs at least 2 pictures with a label each; got {len(images)}, {len(labels)}")
    small = pixels_to_uint8(resize(pixels_to_float(pixels_to_uint8(images)), chosen.size))
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(rng.derive(seed, STEM))
        made = Classifier(chosen, channels=images.shape[1], classes=classes).to(device)
        _fit(made, small, labels.cpu(), rng.generator(seed, "classifier batches"))
    return made.eval()


def cached_classifier(
    dataset: RowDataset,
    folder: Path,
    *,
    about: Mapping[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: ClassifierOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Classifier:
    """The classifier under `folder` for this data, split and recipe; trained when there is none.

    about: name and split of the data; part of the key. A damaged cache entry is trained again, with a line to `say`.
    """
    chosen = options or ClassifierOptions()
    label = dataset.provides.label
    if label is None:
        raise DataError("a classifier needs data with labels; this data set has none")
    key: dict[str, Any] = {
        **about, "data_fingerprint": dataset.fingerprint, "rows": len(dataset), "channels": dataset.target.channels,
        "pixels": dataset.target.height, "classes": label.num_classes, "seed": seed, "recipe": RECIPE,
        "options": asdict(chosen),
    }  # fmt: skip

    def train() -> Classifier:
        images, labels = load_labelled(dataset, chosen.size, seed=seed)
        made = train_classifier(images, labels, label.num_classes, seed=seed, device=device, options=chosen)
        made.about = key
        return made

    def save(made: Classifier, place: Path) -> None:
        sizes = {"options": asdict(chosen), "channels": made.channels, "classes": made.classes}
        kept.write(place, STEM, made, {**sizes, "about": key})

    return fit.cached(
        folder, STEM, key, load=lambda place: load_classifier(place).to(device), train=train, save=save, say=say,
        what=f"{len(dataset)} real pictures ({chosen.steps} steps)",
    )  # fmt: skip


def load_classifier(folder: Path) -> Classifier:
    """Reads what `cached_classifier` wrote. Raises CheckpointError for missing, damaged or unfit files."""

    def make(about: Mapping[str, Any]) -> Classifier:
        options = ClassifierOptions(**about["options"])
        return Classifier(options, channels=about["channels"], classes=about["classes"])

    made, about = kept.read(folder, STEM, make)
    made.about = about["about"]
    return made.eval()


def load_labelled(
    dataset: RowDataset, size: int | None, *, seed: int = 0, most: int = MAX_ROWS
) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, C, size, size) and labels (N,), at most `most` rows drawn by seed; size None = as they are.

    Rows without a label or that cannot be read are left out. Raises DataError when too few remain.
    """
    images, labels = fit.readable(
        dataset, size, lambda row: row.label, judge=STEM, needs="labels", seed=seed, most=most
    )
    return images, torch.tensor(labels)


def class_scores(
    judge: Classifier,
    fake: Tensor,
    asked: Tensor,
    real: Tensor,
    real_labels: Tensor,
    *,
    about: Mapping[str, str],
    seed: int = 0,
    shrink: Sequence[int] = (),
) -> list[Score]:
    """`class_accuracy`: share of samples (N, C, H, W) that the judge gives the class they were asked for, (N,).

    shrink  sides in px: `class_accuracy@32px` is the same after pictures were shrunk to 32 px (bilinear), as AC-GAN
            asks whether the detail of a large sample tells its class. Sides from the judge's own up are left out,
            since the judge shrinks pictures to its side itself
    Floor: the same samples against their labels shuffled. Ceiling: real pictures of the scored split.
    """
    shuffled = asked.cpu()[rng.permutation(len(asked), seed, "shuffled labels")]
    fields: dict[str, object] = {
        **about, "judge": judge.fingerprint, "n": len(fake), "ref": len(real), "classes": judge.classes, "seed": seed,
    }  # fmt: skip

    def score(name: str, fake: Tensor, real: Tensor) -> Score:
        named = judge.predict(fake)
        hit = (named == asked.cpu()).double()
        return Score(
            name,
            float(hit.mean()),
            floor=float((named == shuffled).double().mean()),
            ceiling=judge.accuracy(real, real_labels),
            error=float(hit.std() / len(hit) ** 0.5),
            signature=signature(name, **fields),
        )

    scores = [score("class_accuracy", fake, real)]
    for side in shrink:
        if side < min(judge.options.size, *fake.shape[-2:]):
            scores.append(score(f"class_accuracy@{side}px", shrunk(fake, side), shrunk(real, side)))
    return scores


def shrunk(images: Tensor, side: int) -> Tensor:
    """Pictures (N, C, H, W) -> uint8 (N, C, side, side), bilinear."""
    return pixels_to_uint8(resize(pixels_to_float(pixels_to_uint8(images)), side))


def cas_scores(
    fake: Tensor,
    asked: Tensor,
    train: Tensor,
    train_labels: Tensor,
    real: Tensor,
    real_labels: Tensor,
    *,
    classes: int,
    about: Mapping[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: ClassifierOptions | None = None,
) -> list[Score]:
    """`cas`: accuracy on real pictures of a classifier that was trained on the samples.

    Floor: trained on the samples with their labels shuffled. Ceiling: trained on as many real pictures (`train`, a
    split that is not `real`). All three take the same number of pictures and steps.
    """
    chosen, count = options or ClassifierOptions(), min(len(fake), len(train))
    fake, asked, train, train_labels = fake[:count], asked[:count].cpu(), train[:count], train_labels[:count]
    shuffled = asked[rng.permutation(count, seed, "shuffled labels")]

    def accuracy(images: Tensor, labels: Tensor) -> float:
        made = train_classifier(images, labels, classes, seed=seed, device=device, options=chosen)
        return made.accuracy(real, real_labels)

    recipe = hashlib.sha256(json.dumps([RECIPE, asdict(chosen)], sort_keys=True).encode()).hexdigest()[:8]
    text = signature("cas", **about, recipe=recipe, n=count, ref=len(real), classes=classes, seed=seed)
    value = accuracy(fake, asked)
    error = (value * (1 - value) / len(real)) ** 0.5
    floor, ceiling = accuracy(fake, shuffled), accuracy(train, train_labels)
    return [Score("cas", value, floor=floor, ceiling=ceiling, error=error, signature=text)]


def _fit(made: Classifier, images: Tensor, labels: Tensor, draws: torch.Generator) -> None:
    options, device = made.options, next(made.parameters()).device
    optimizer = torch.optim.AdamW(made.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    def loss(rows: Tensor) -> Tensor:
        pixels = fit.augment(pixels_to_float(images[rows]), draws).to(device)
        return F.cross_entropy(made(pixels), labels[rows].to(device))

    fit.fit(
        made, len(images), loss, optimizer=optimizer, schedule=fit.cosine(optimizer, options.steps),
        steps=options.steps, batch_size=options.batch_size, draws=draws,
    )  # fmt: skip
