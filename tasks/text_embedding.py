"""Pictures and sentences -> a text encoder for text-to-image systems (Reed et al., CVPR 2016, arXiv:1605.05395)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from condgen.data.base import RowDataset
from condgen.errors import ConfigError
from condgen.metrics.evaluator import load_pairs
from condgen.metrics.retrieval import candidate_rows, r_precision, strangers
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.pixels import pixels_to_float
from condgen.systems.joint_embedding import JointEmbedding
from condgen.task import Task
from condgen.types import Condition, Text

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.conditions.text_encoders import CachedEncoder
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.trainer import Hook
    from condgen.engine.world import World


class TextEmbedding(Task):
    """Scores how often a held-out picture picks its own sentence among 10 and 100; floor 1/k, ceiling 1."""

    conditions: ClassVar[tuple[str, ...]] = ("text",)
    trains: ClassVar[type] = JointEmbedding

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        """The retrieval scores every train.sample_every steps."""
        from condgen.engine.trainer import Hook

        if not isinstance(built.test_data, RowDataset):
            return ()

        def validate(system: Any, step: int) -> dict[str, float]:
            return {score.name: score.value for score in retrieval(system, built, built.config.eval)}

        return [Hook("retrieval", built.options.sample_every, validate)]

    def score(self, system: Any, built: Built, world: World, options: Any) -> list[Score]:
        return retrieval(system, built, options)


def retrieval(system: nn.Module, built: Built, options: Any, candidates: Sequence[int] = (10, 100)) -> list[Score]:
    """retrieval@k of a joint embedding on the test data. Raises ConfigError for any other system."""
    if not isinstance(system, JointEmbedding) or built.encoder is None:
        raise ConfigError("task=text_embedding scores joint embeddings; choose system=joint_embedding")
    if not isinstance(built.test_data, RowDataset):
        raise ConfigError("retrieval reads rows by number, which a stream cannot give; choose a data set for the test")
    encoder, size = built.encoder, built.target.height
    images, captions = load_pairs(built.test_data, size, seed=options.seed, most=options.num_samples)
    of_images, of_texts = embed(system, encoder, images, captions, options.batch_size)
    other = strangers(captions, seed=options.seed)
    made = []
    for k in [k for k in candidates if k <= len(set(captions))]:
        rows = candidate_rows(captions, k, seed=options.seed)
        hits = r_precision(of_images, of_texts, rows)
        protocol = signature(
            f"retrieval@{k}",
            cand=k,
            n=len(hits),
            text=encoder.name,
            data=f"{built.config.data_name}#{built.test_data.fingerprint}",
            split=options.split,
            size=size,
            seed=options.seed,
        )
        made.append(
            Score(
                name=f"retrieval@{k}",
                value=float(hits.mean()),
                floor=float(r_precision(of_images[other], of_texts, rows).mean()),
                ceiling=1.0,
                error=float(hits.std()) / len(hits) ** 0.5,
                signature=protocol,
            )
        )
    return made


@torch.no_grad()
def embed(
    system: JointEmbedding, encoder: CachedEncoder, images: Tensor, captions: Sequence[str], batch_size: int
) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, C, H, W) and N captions -> (N, dim) each, on the CPU; the mode of the system is kept."""
    device = next(system.parameters()).device
    was_training = system.training
    system.eval()
    left, right = [], []
    for start in range(0, len(captions), batch_size):
        rows = slice(start, start + batch_size)
        text = encoder.attach(Condition(text=Text(strings=tuple(captions[rows])))).to(device)
        left.append(system.scored(system.embed_images(pixels_to_float(images[rows]).to(device))).float().cpu())
        right.append(system.scored(system.embed_texts(text)).float().cpu())
    system.train(was_training)
    return torch.cat(left), torch.cat(right)
