"""Pictures and sentences -> a text encoder for text-to-image systems (Reed et al., CVPR 2016, arXiv:1605.05395)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from condgen.engine.trainer import Hook
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
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World


class TextEmbedding(Task):
    """Scores how often a held-out picture picks its own sentence among 10 and 100; floor 1/k, ceiling 1."""

    conditions: ClassVar[tuple[str, ...]] = ("text",)

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        """The retrieval score at every train.sample_every steps."""

        def run_hook(system: object, step: int) -> dict[str, float]:
            return {score.name: score.value for score in self._retrieval(built)}

        return [Hook("retrieval", built.options.sample_every, run_hook)]

    def score(self, built: Built, world: World) -> list[Score]:
        return self._retrieval(built)

    def _retrieval(self, built: Built, candidates: Sequence[int] = (10, 100)) -> list[Score]:
        system, encoder, options = built.system, built.encoder, built.config.eval
        if not isinstance(system, JointEmbedding) or encoder is None:
            raise ConfigError("task=text_embedding scores joint embeddings; choose system=joint_embedding")
        size = built.target.height
        images, captions = load_pairs(built.test_data, size, seed=options.seed, most=options.num_samples)
        device = next(system.parameters()).device
        left, right = [], []
        was_training = system.training
        system.eval()
        with torch.no_grad():
            for start in range(0, len(captions), options.batch_size):
                rows = slice(start, start + options.batch_size)
                text = encoder.attach(Condition(text=Text(strings=tuple(captions[rows])))).to(device)
                left.append(system.embed_images(pixels_to_float(images[rows]).to(device)).cpu())
                right.append(system.embed_texts(text).cpu())
        system.train(was_training)
        of_images, of_texts = torch.cat(left), torch.cat(right)
        other = strangers(captions, seed=options.seed)
        made = []
        for k in [k for k in candidates if k <= len(set(captions))]:
            rows_k = candidate_rows(captions, k, seed=options.seed)
            hits = r_precision(of_images, of_texts, rows_k)
            made.append(
                Score(
                    name=f"retrieval@{k}",
                    value=float(hits.mean()),
                    floor=float(r_precision(of_images[other], of_texts, rows_k).mean()),
                    ceiling=1.0,
                    error=float(hits.std()) / len(hits) ** 0.5,
                    signature=signature(
                        f"retrieval@{k}",
                        cand=k,
                        n=len(hits),
                        text=encoder.name,
                        data=f"{built.config.data_name}#{built.test_data.fingerprint}",
                        split=options.split,
                        size=size,
                        seed=options.seed,
                    ),
                )
            )
        return made
