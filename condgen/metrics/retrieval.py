"""Text R-precision: does a generated picture belong to its own caption more than to others?

Xu et al., CVPR 2018 (AttnGAN, arXiv:1711.10485) rank a picture's caption among 100. Here the floor (pictures
judged against somebody else's caption) and the ceiling (the real pictures) are measured with the same candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DataError, ShapeError
from condgen.metrics.evaluator import Evaluator
from condgen.metrics.score import Score
from condgen.metrics.signature import signature

CANDIDATES = (10, 100)


def candidate_rows(captions: Sequence[str], candidates: int, *, seed: int = 0) -> Tensor:
    """int64 (N, candidates): column 0 is the row itself, the others are rows of distinct other captions.

    The k-1 others differ from the own caption and from each other as strings. Row i depends on (seed, i) and the
    captions. Raises DataError when there are fewer than `candidates` distinct captions.
    """
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
    pool = torch.tensor(list(first.values()))
    if candidates < 2 or len(pool) < candidates:
        raise DataError(
            f"R-precision among {candidates} needs at least 2 candidates and as many distinct captions; "
            f"there are {len(pool)}. Raise eval.num_samples or lower the number of candidates"
        )
    code = {caption: at for at, caption in enumerate(first)}
    out = torch.empty(len(captions), candidates, dtype=torch.int64)
    for row, caption in enumerate(captions):
        drawn = torch.randperm(len(pool) - 1, generator=rng.generator(seed, "candidates", row))[: candidates - 1]
        others = drawn + (drawn >= code[caption])  # skips the own caption
        out[row] = torch.cat([torch.tensor([row]), pool[others]])
    return out


def r_precision(images: Tensor, texts: Tensor, rows: Tensor) -> Tensor:
    """Hits (N,) in [0, 1] of unit vectors images (N, E) ranked against texts[rows], column 0 being the own caption.

    1 where the own caption scores highest; t captions that tie for the highest share the hit (1/t), so that an
    evaluator without information gets exactly 1/k.
    """
    if images.shape != texts.shape or len(rows) != len(images):
        raise ShapeError(
            f"images {tuple(images.shape)}, texts {tuple(texts.shape)} and candidates {tuple(rows.shape)} do not match"
        )
    scores = torch.einsum("ne,nke->nk", images.double(), texts.double()[rows])
    best = scores == scores.max(dim=1, keepdim=True).values
    return best[:, 0].double() / best.sum(dim=1)


def retrieval_scores(
    evaluator: Evaluator,
    fake: Tensor,
    real: Tensor,
    captions: Sequence[str],
    pooled: Tensor,
    *,
    about: Mapping[str, str],
    candidates: Sequence[int] = CANDIDATES,
    seed: int = 0,
) -> list[Score]:
    """rprec@k of generated pictures, with shuffled-caption floor, real-picture ceiling and standard error.

    fake, real (N, C, H, W), captions N and pooled (N, D) belong together row by row; real pictures come from a
    split the evaluator has not been trained on. about: signature fields the caller knows (data, split, text and
    whether the generator reads the same text encoder). Sizes of `candidates` that exceed the distinct captions
    are left out, so that fewer than 10 distinct captions give no score.
    """
    count = len(captions)
    if not len(fake) == len(real) == len(pooled) == count or count < 2:
        raise ShapeError(
            f"{len(fake)} generated and {len(real)} real pictures, {len(pooled)} embeddings and {count} captions; "
            "give the same number of each, at least 2"
        )
    distinct = len(set(captions))
    possible = [k for k in candidates if k <= distinct]
    of_fake, of_real = evaluator.embed_images(fake), evaluator.embed_images(real)
    texts = evaluator.embed_text(pooled)
    other = strangers(captions, seed=seed)
    made = []
    for k in possible:
        rows = candidate_rows(captions, k, seed=seed)
        hits = r_precision(of_fake, texts, rows)
        made.append(
            Score(
                name=f"rprec@{k}",
                value=float(hits.mean()),
                floor=float(r_precision(of_fake[other], texts, rows).mean()),
                ceiling=float(r_precision(of_real, texts, rows).mean()),
                error=float(hits.std()) / count**0.5,
                signature=signature(f"rprec@{k}", cand=k, n=count, evaluator=evaluator.fingerprint, **about, seed=seed),
            )
        )
    return made


def strangers(captions: Sequence[str], *, seed: int = 0) -> Tensor:
    """int64 (N,): for each row another row, with another caption wherever there is one, drawn by seed."""
    order = rng.permutation(len(captions), seed, "strangers").tolist()
    place = {row: at for at, row in enumerate(order)}
    out = torch.empty(len(captions), dtype=torch.int64)
    for row, caption in enumerate(captions):
        ahead = [order[(place[row] + step) % len(order)] for step in range(1, len(order))]
        out[row] = next((other for other in ahead if captions[other] != caption), ahead[0])
    return out
