"""Scores of one set of pictures against another, with the anchors that make them readable: FID, KID, Inception score,
precision and recall, density and coverage, memorisation, MS-SSIM, Parzen windows. One pass of one network feeds all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen.data.base import RowDataset
from condgen.data.cache import cache_folder
from condgen.errors import ConfigError, DataError
from condgen.inference.sample import Gathering, rows_of_rank
from condgen.metrics import kept
from condgen.metrics.diversity import WINDOW, diversity_scores
from condgen.metrics.evaluator import Evaluator
from condgen.metrics.extractors import Extractor, extractor
from condgen.metrics.frechet import MIN_SAMPLES, frechet_distance
from condgen.metrics.inception_score import inception_scores
from condgen.metrics.kernel import kid
from condgen.metrics.manifold import K_DENSITY, manifold_scores
from condgen.metrics.neighbours import memorisation_scores, neighbour_picture
from condgen.metrics.parzen import parzen_scores
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.metrics.statistics import Gaussian, gaussian_of
from condgen.pixels import pixels_to_uint8

MIN_OF_CLASS = 50  # pictures of one class in each set, for a KID of the class
METRICS = ("kid", "fid", "is", "prdc", "memorisation", "ms_ssim", "parzen")


@dataclass(frozen=True)
class Labels:
    """Class numbers of the three sets (N,) and the classes' names: scores for each class too."""

    fake: Tensor
    real: Tensor
    other: Tensor
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Sets:
    """The same rows of four sets, as pictures or as features: samples, held-out real ones, training ones, noise."""

    fake: Tensor
    real: Tensor
    other: Tensor
    noise: Tensor

    def rows(self, labels: Labels, number: int) -> Sets:
        """Those of class `number`; noise goes with the samples."""
        of = (labels.fake, labels.real, labels.other, labels.fake)
        every = zip((self.fake, self.real, self.other, self.noise), of, strict=True)
        return Sets(*(x[(y.cpu() == number).to(x.device)] for x, y in every))

    @property
    def least(self) -> int:
        return min(map(len, (self.fake, self.real, self.other, self.noise)))


def quality_scores(
    fake: Tensor,
    real: Tensor,
    other: Tensor,
    *,
    name: str = "auto",
    about: Mapping[str, str],
    metrics: Sequence[str] = ("kid", "fid"),
    force_fid: bool = False,
    evaluator: Evaluator | None = None,
    train: RowDataset | None = None,
    train_pictures: Tensor | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    labels: Labels | None = None,
    world: Gathering | None = None,
    attribution: str = "",
) -> list[Score]:
    """The scores that `metrics` names ("all" = METRICS) and the sets allow.

    fake, real   pictures (N, C, H, W); real ones from a split that was not trained on
    other        real pictures of another split: what a perfect generator would get (the ceiling)
    name         the extractor, see `condgen.metrics.extractors`
    about        signature fields that the caller knows: data, split
    metrics      kid, fid (from 2,048 pictures a side, or with force_fid), is (where the extractor has a head), prdc
                 (precision, recall, density, coverage), memorisation, ms_ssim (of any two samples), parzen
    train        the training split, for the extractor "own"
    train_pictures   pictures among which memorisation looks for copies; begins with `other`, and is `other` if None
    labels       also `kid/<class>` for each class with 50 pictures in every set, and `fid/<class>` from 2,048
    world        processes that share the pictures; each returns the same scores. Every rank must call it
    attribution  licence line of the data, below pictures

    The floor is uniform noise of the same shape, under the same extractor. Features of real pictures and of noise are
    kept in the cache folder. Memory: 4 d bytes a picture (50,000 x 2,048: 0.41 GB a set, four sets), 0.4 GB besides.
    """
    if min(len(fake), len(real), len(other)) < 4:
        raise DataError(f"KID needs at least 4 pictures a side; got {len(fake)}, {len(real)} and {len(other)}")
    unknown = [one for one in metrics if one not in (*METRICS, "all")]
    if unknown:
        raise ConfigError(f"there is no score {unknown[0]!r}; eval.metrics takes {', '.join(METRICS)}, all")
    wanted = METRICS if "all" in metrics else tuple(metrics)
    if name == "own" and world is not None and world.world > 1:
        if world.rank == 0:
            extractor(name, train=train, about=_key(about), device=device)  # trains it; the others read the cache
        world.gather(torch.zeros(1, device=world.device))
    network = extractor(name, evaluator=evaluator, train=train, about=_key(about), device=device)
    noise = torch.rand(fake.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    pool = other if train_pictures is None else train_pictures
    if not torch.equal(pool[: len(other)], other):
        raise DataError("train_pictures has to begin with the pictures of `other`, so that none is looked at twice")
    held = [_features(network, fake, world, keep=False), *(_features(network, x, world) for x in (real, pool, noise))]
    sets = Sets(held[0], held[1], held[2][: len(other)], held[3])
    fields = {**about, **network.signature_fields(), "seed": str(seed)}
    found = _distances("", sets, wanted, fields=fields, seed=seed, force=force_fid)
    plain = {key: value for key, value in fields.items() if key != "seed"}
    if "is" in wanted and network.head is not None:
        logits = [network.logits(x) for x in (sets.fake, sets.real, sets.noise)]
        found += inception_scores(*logits, head=f"{network.name}#{network.fingerprint}", fields=plain, seed=seed)
    if "prdc" in wanted and sets.least > K_DENSITY:
        found += manifold_scores(sets.fake, sets.real, sets.other, sets.noise, fields=plain, seed=seed)
    if "memorisation" in wanted:
        picture = neighbour_picture(fake, pool, sets.fake, held[2], attribution=attribution)
        found += memorisation_scores(sets.fake, sets.real, held[2], sets.noise, fields=plain, seed=seed, shown=picture)
        flat = [_flat(x) for x in (fake, real, pool, noise)]
        found += memorisation_scores(
            flat[0], flat[1], flat[2], flat[3], fields=dict(about), seed=seed, suffix="/pixels"
        )
    if "ms_ssim" in wanted and min(fake.shape[-2:]) >= WINDOW:
        found += _variety(fake, real, about=about, seed=seed)
    if "parzen" in wanted:
        found += parzen_scores(fake, real, other, noise, fields=dict(about), seed=seed)
    for number in [] if labels is None else labels.fake.unique().tolist():
        assert labels is not None
        part = sets.rows(labels, number)
        if part.least >= MIN_OF_CLASS:
            label = labels.names[number] if number < len(labels.names) else str(number)
            found += _distances(f"/{label}", part, wanted, fields=fields, seed=seed)
    return found


def _key(about: Mapping[str, str]) -> dict[str, str]:
    """What names a network of the training split: the data set's name without the hash of the scored split."""
    return {"data": about.get("data", "").partition("#")[0], "split": "train"}


def _features(network: Extractor, pictures: Tensor, world: Gathering | None, *, keep: bool = True) -> Tensor:
    """float32 (N, d) of all pictures, on every process; each process looks at its share of them."""
    folder = cache_folder() / "features"
    keep = keep and network.name != "pixels"  # faster than the disk
    found, name = None, ""
    if keep:
        fields = network.signature_fields()
        name = kept.name_of(pixels_to_uint8(pictures), f"{fields['ext']}|{fields['resize']}")
        found = kept.read_features(folder, name, len(pictures))
    if world is None or world.world == 1:
        made = network.features(pictures) if found is None else found
    else:
        everywhere = world.gather(torch.tensor([found is not None], device=world.device).float())
        if found is not None and bool(everywhere.all()):
            return found
        made = _shared(network, pictures, world)
    if keep and found is None and (world is None or world.rank == 0):
        kept.write_features(folder, name, made)
    return made


def _shared(network: Extractor, pictures: Tensor, world: Gathering) -> Tensor:
    """Rank r looks at rows r, r + world, ...; rows come back in their own order."""
    rows = list(rows_of_rank(len(pictures), world.rank, world.world))
    each = -(-len(pictures) // world.world)
    rows += [0] * (each - len(rows))  # collectives need equal sizes
    mine = network.features(pictures[rows])
    every = world.gather(mine.to(world.device)).cpu()
    return every.view(world.world, each, -1).transpose(0, 1).flatten(0, 1)[: len(pictures)].contiguous()


def _flat(pictures: Tensor) -> Tensor:
    """Rows of pixels in [0, 1], of pictures rounded to 8 bits."""
    return pixels_to_uint8(pictures).flatten(1).float() / 255


def _variety(fake: Tensor, real: Tensor, *, about: Mapping[str, str], seed: int) -> list[Score]:
    """`ms_ssim/any`: of pairs of any two samples; see `condgen.metrics.diversity` for pairs of one class."""
    one = (torch.zeros(len(x), dtype=torch.int64) for x in (fake, real))
    every = diversity_scores(fake, next(one), real, next(one), names=["any"], about=about, seed=seed)
    return [score for score in every if score.name == "ms_ssim/any"]


def _distances(
    suffix: str, sets: Sets, wanted: Sequence[str], *, fields: Mapping[str, str], seed: int, force: bool = False
) -> list[Score]:
    """KID, and FID where there are enough, of features (n, d); `suffix` ends the names."""
    fields = {**fields, "n": str(len(sets.fake)), "ref": str(len(sets.real))}
    enough = min(len(sets.fake), len(sets.real)) >= MIN_SAMPLES
    found = []
    if "kid" in wanted:
        few = "fid" in wanted and not (enough or force) and not suffix
        found.append(_kid(suffix, sets, fields=fields, seed=seed, note=_too_few(sets) if few else ""))
    if "fid" in wanted and (enough or force):
        real, fake, noise = (gaussian_of(x) for x in (sets.real, sets.fake, sets.noise))
        ceiling: Gaussian | None = None
        if len(sets.other) >= MIN_SAMPLES or (force and not enough):
            ceiling = gaussian_of(sets.other)
        found.append(
            Score(
                name=f"fid{suffix}",
                value=frechet_distance(real, fake),
                floor=frechet_distance(real, noise),
                ceiling=None if ceiling is None else frechet_distance(real, ceiling),
                signature=signature(f"fid{suffix}", **fields, forced=None if enough else "below 2048"),
                higher_is_better=False,
                note="" if enough else "forced below 2,048 pictures a side: its bias is larger than most differences",
            )
        )
    return found


def _kid(suffix: str, sets: Sets, *, fields: Mapping[str, str], seed: int, note: str) -> Score:
    measured = kid(sets.real, sets.fake, seed=seed)
    subsets = {"subsets": measured.subsets, "subset_size": measured.subset_size}
    interval = measured.interval
    says = [] if interval is None else [f"95 % interval {interval[0]:.4g} to {interval[1]:.4g}"]
    return Score(
        name=f"kid{suffix}",
        value=measured.value,
        floor=kid(sets.real, sets.noise, seed=seed).value,
        ceiling=kid(sets.real, sets.other, seed=seed).value,
        error=measured.error,
        signature=signature(f"kid{suffix}", **fields, **subsets),
        higher_is_better=False,
        note="; ".join(says + [note] * bool(note)),
    )


def _too_few(sets: Sets) -> str:
    return (
        f"no FID of {len(sets.fake)} pictures against {len(sets.real)}: below {MIN_SAMPLES} its bias dominates; "
        "raise eval.num_samples, or take eval.force_fid=true where only equal counts are compared"
    )
