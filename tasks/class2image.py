"""A class -> a picture. Scored by class accuracy, CAS, MS-SSIM and KID (each class too), condition sensitivity.

With data.ignore=[label,...] and an unconditional system it draws without a class, and KID and FID alone are scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from condgen import rng
from condgen.data.base import RowDataset, collate
from condgen.data.cache import cache_folder
from condgen.engine.trainer import Hook
from condgen.errors import ConfigError
from condgen.inference.sample import sample_over, sample_rows
from condgen.metrics.classifier import (
    Classifier,
    ClassifierOptions,
    cached_classifier,
    cas_scores,
    class_scores,
    load_labelled,
)
from condgen.metrics.diversity import WINDOW, diversity_scores
from condgen.metrics.quality import Labels, quality_scores
from condgen.metrics.score import Score
from condgen.options import Range
from condgen.show.drawing import draw_grid
from condgen.systems.base import System
from condgen.task import (
    SENSITIVITY_ROWS,
    Task,
    judged,
    rows_of,
    sensitivity_hook,
    sensitivity_scores,
)
from condgen.types import Sample

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World

COLUMNS = 8
SHRINK = (64, 32)  # px, of class accuracy
LISTED = 20  # class names that a signature spells out
LOOKED_THROUGH = 512  # rows that are read to find one of each class


class Class2Image(Task):
    """The sample grid has one row for each class, beside a real picture of it.

    grid_rows         most rows of the sample grid
    classifier_steps  training steps of the judge and of each classifier of CAS
    classifier_size   side of the pictures that they see; 64 or 128 asks for detail in large samples, and scores
                      them shrunk to 64 and 32 px as well
    cas               also train on samples and test on real pictures: three more small trainings
    per_class         also KID (and FID, from 2,048 pictures of a class) of each class with 50 pictures
    """

    def __init__(
        self, *, grid_rows: Annotated[int, Range(1)] = 10, classifier_steps: Annotated[int, Range(1)] = 400,
        classifier_size: Literal[16, 32, 64, 128] = 32, cas: bool = True, per_class: bool = True,
    ) -> None:  # fmt: skip
        self.grid_rows, self.cas, self.per_class = grid_rows, cas, per_class
        self.classifier = ClassifierOptions(steps=classifier_steps, size=classifier_size)

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        data, every = built.train_data, built.options.sample_every
        if not isinstance(data, RowDataset):
            return ()
        shown = one_of_each(data, self.grid_rows)
        batch = built.prepare(collate(shown, built.spec)).as_float()
        condition, count = batch.condition, len(shown)

        def draw(system: System, step: int) -> None:
            conditional = len(condition) > 0
            ids = list(range(COLUMNS)) * count if conditional else list(range(COLUMNS * count))
            pixels = sample_rows(system, condition.repeat(COLUMNS) if conditional else condition, seed=0, ids=ids)
            names = data.provides.label.names if data.provides.label is not None else ()
            grid = draw_grid(
                pixels.view(count, COLUMNS, *pixels.shape[1:]),
                condition if conditional else None,
                real=batch.target if conditional else None,
                label_names=names,
                title=f"step {step}",
                attribution=data.attribution,
            )
            log.media(step, "grid", grid)

        hooks = [Hook("grid", every, draw)]
        probe = rows_of(built, data, min(SENSITIVITY_ROWS, len(data)), seed=1)[0]
        return [*hooks, sensitivity_hook(probe, every)] if len(probe) > 1 else hooks

    def score(self, system: System, built: Built, world: World, options: Any) -> list[Score]:
        """class_accuracy, cas; ms_ssim and KID (FID from 2,048 pictures) overall and for each class; sensitivity."""
        data, train = built.test_data, built.train_data
        if not isinstance(data, RowDataset) or not isinstance(train, RowDataset):
            raise ConfigError(f"{built.config.data_name} is a stream; scores read rows by number. Use another data set")
        condition, real, _ = rows_of(built, data, options.num_samples, seed=options.seed)
        others, other, _ = rows_of(built, train, options.num_samples, seed=options.seed)
        real, other = real[: len(data)], other[: len(train)]  # conditions may be used again; pictures are compared
        ids = list(range(options.num_samples))
        fake = sample_over(world, system, condition, seed=options.seed, ids=ids, batch_size=options.batch_size)
        about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": built.config.eval.split}
        about |= system.sample_fields
        scores: list[Score] = []
        labels = None
        if condition.label is not None and others.label is not None and data.provides.label is not None:
            names = data.provides.label.names
            about["labels"] = listed(names)
            labels = Labels(condition.label, condition.label[: len(real)], others.label[: len(other)], names)
            scores += self.by_class(built, world, fake, condition.label, real, about=about, seed=options.seed)
        scores += quality_scores(
            fake, real, other, about=about, labels=labels if self.per_class else None, **judged(built, world)
        )
        if len(condition) > 1:
            scores += sensitivity_scores(system, condition, about=about, seed=options.seed)
        return scores

    def by_class(
        self, built: Built, world: World, fake: Tensor, asked: Tensor, real: Tensor, *, about: Mapping[str, str],
        seed: int,
    ) -> list[Score]:  # fmt: skip
        """The scores that need the classes; `asked` (N,) starts with the labels of the pictures `real`."""
        train = built.train_data
        assert isinstance(train, RowDataset) and train.provides.label is not None
        labels, spec = asked[: len(real)], train.provides.label
        if world.is_main:
            self.judge(built, world.device)  # trains it; the others then read it from the cache
        world.barrier()
        scores = class_scores(
            self.judge(built, world.device), fake, asked, real, labels, about=about, seed=seed, shrink=SHRINK
        )
        if self.cas:
            pictures, truth = load_labelled(train, None, seed=seed, most=len(fake))
            scores += cas_scores(
                fake, asked, pictures, truth, real, labels, classes=spec.num_classes, about=about, seed=seed,
                device=world.device, options=self.classifier,
            )  # fmt: skip
        if min(fake.shape[-2:]) >= WINDOW and shared_classes(asked, labels):
            scores += diversity_scores(fake, asked, real, labels, names=spec.names, about=about, seed=seed)
        return scores

    def judge(self, built: Built, device: torch.device) -> Classifier:
        """The classifier for this data, trained on its training split unless the cache has it."""
        assert isinstance(built.train_data, RowDataset)
        about = {"data": built.config.data_name, "split": "train"}
        folder = cache_folder() / "classifiers"
        return cached_classifier(
            built.train_data, folder, about=about, device=device, options=self.classifier, say=print
        )


def one_of_each(data: RowDataset, most: int) -> list[Sample]:
    """The first row of each class in the order of the classes, at most `most`; any rows where there is no label."""
    found: dict[int, Sample] = {}
    classes = data.provides.label.num_classes if data.provides.label is not None else 0
    rows = rng.permutation(len(data), 0, "shown rows").tolist()[:LOOKED_THROUGH]
    if not classes:
        return [data.sample(row, None) for row in rows[:most]]
    for row in rows:
        sample = data.sample(row, None)
        if sample.label is not None:
            found.setdefault(sample.label, sample)
        if len(found) == classes:
            break
    return [found[label] for label in sorted(found)[:most]]


def listed(names: Sequence[str]) -> str:
    """Which classes a score is about: their names, or of many the first, the last and a hash of all."""
    plain = [" ".join(name.replace("|", "/").split()) for name in names]
    if len(plain) <= LISTED:
        return ",".join(plain)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{plain[0]}..{plain[-1]}({len(plain)})#{digest}"


def shared_classes(a: Tensor, b: Tensor) -> bool:
    """Whether some class has two rows in both (N,) and (M,)."""
    counts = [{n for n, c in zip(*x.unique(return_counts=True), strict=True) if c > 1} for x in (a.cpu(), b.cpu())]
    return bool({int(n) for n in counts[0]} & {int(n) for n in counts[1]})
