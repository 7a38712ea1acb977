"""What the tasks that make clips share: the clips that are looked at during training, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from torch import Tensor

from condgen.conditions.image import resize
from condgen.data.base import RowDataset
from condgen.engine.trainer import Hook
from condgen.errors import ConfigError
from condgen.inference.sample import sample_over, sample_rows, sample_streams
from condgen.metrics.extractors import Extractor, extractor
from condgen.metrics.frame_nats import HasFrameNats, frame_scores, nats_per_frame
from condgen.metrics.own_clips import MiddleFrames
from condgen.metrics.score import Score
from condgen.metrics.sensitivity import condition_sensitivity
from condgen.metrics.video import (
    ClipExtractor,
    clip_extractor,
    curve_scores,
    fvd_scores,
    given_scores,
    mask_scores,
    motion_scores,
    moving_pixels,
)
from condgen.options import Range
from condgen.pixels import pixels_to_float
from condgen.show.clips import grid_clip
from condgen.show.drawing import draw_clip_strip
from condgen.systems.base import HasStreams, System
from condgen.task import Task, batch_of, blocks_of, sensitivity_hook
from condgen.types import Batch, Condition

if TYPE_CHECKING:
    from condgen.build import Built
    from condgen.engine.log import Log
    from condgen.engine.run import RunFolder
    from condgen.engine.world import World

Made = TypeVar("Made")
COLUMNS = 2
SENSITIVITY_ROWS = 8
KVD_ROWS = 4  # with fewer held-out clips there is no KVD


class ClipTask(Task):
    """samples/step-N-clips.gif plays what was asked, the real clip and samples; clips.png shows the same as a sheet.

    grid_rows   rows of both
    fps         of the GIF
    fvd         features of FVD and KVD: "frames" = those of eval.extractor, "own" = a network trained on the training
                clips, or "torchscript:<file>" (metrics/video.py)
    likelihood_clips   held-out clips of nats_per_frame and bpd, read a batch at a time; 0 = eval.num_samples
    watched     held-out clips whose nats a frame are logged during training, of a system that has them; 0 = none
    """

    def __init__(
        self,
        *,
        grid_rows: Annotated[int, Range(1)] = 4,
        fps: Annotated[float, Range(1, 50)] = 8.0,
        fvd: str = "frames",
        likelihood_clips: Annotated[int, Range(0)] = 0,
        watched: Annotated[int, Range(0)] = 32,
    ) -> None:
        self.grid_rows, self.fps, self.fvd = grid_rows, fps, fvd
        self.likelihood_clips, self.watched = likelihood_clips, watched

    def hooks(self, built: Built, run: RunFolder, log: Log) -> Sequence[Hook]:
        """clips; nats where frames have a cost; sensitivity where there is a condition."""
        if not built.target.frames:
            raise ConfigError(
                f"the task {built.config.task} makes clips, and {built.config.data_name} gives pictures; "
                "use data=clips, moving_openmoji or moving_mnist"
            )
        data, every = built.train_data, built.options.sample_every
        batch = batch_of(built, data, self.grid_rows, seed=0)
        condition, real = batch.condition, batch.target
        rows, conditional = len(real), len(condition) > 0
        about: dict[str, Any] = {
            "label_names": data.provides.label.names if data.provides.label is not None else (),
            "attribution": data.attribution,
        }

        def draw(system: System, step: int) -> None:
            ids = list(range(COLUMNS)) * rows if conditional else list(range(COLUMNS * rows))
            asked = condition.repeat(COLUMNS) if conditional else condition
            clips = sample_rows(system, asked, seed=0, ids=ids, batch_size=8).unflatten(0, (rows, COLUMNS))
            shown = condition if conditional else None
            log.media(step, "clips", draw_clip_strip(clips[:, 0], shown, title=f"step {step}", most=8, **about))
            log.clip(step, "clips", grid_clip(clips, shown, real=real, title=f"step {step}", **about), fps=self.fps)

        hooks = [Hook("clips", every, draw)]
        held_out = built.test_data
        if self.watched and isinstance(built.system, HasFrameNats) and isinstance(held_out, RowDataset):
            watched = batch_of(built, held_out, min(self.watched, len(held_out)), seed=1)

            def nats(system: System, step: int) -> dict[str, float]:
                assert isinstance(system, HasFrameNats)
                found = nats_per_frame(system, watched.target, watched.condition, given=given_again(watched))
                return {"nats_per_frame": found[0].value}

            hooks.append(Hook("nats", every, nats))
        probe = batch_of(built, data, SENSITIVITY_ROWS, seed=1).condition
        return [*hooks, sensitivity_hook(probe, every)] if len(probe) > 1 else hooks

    def score(self, system: System, built: Built, world: World, options: Any) -> list[Score]:
        """Nats a frame and bits where frames have a cost; curves against the true clip where a frame is given; motion,
        masks, KVD and FVD; sensitivity."""
        data, train = built.test_data, built.train_data
        if not isinstance(data, RowDataset) or not isinstance(train, RowDataset):
            raise ConfigError(f"{built.config.data_name} is a stream; scores read rows by number. Use another data set")
        seed = options.seed
        batch = batch_of(built, data, options.num_samples, seed=seed)
        other = batch_of(built, train, options.num_samples, seed=seed).target[: len(train)]
        condition, count = batch.condition, len(batch)
        ids = list(range(count))
        fake = sample_over(world, system, condition, seed=seed, ids=ids, batch_size=options.batch_size)
        about = {"data": f"{built.config.data_name}#{data.fingerprint}", "split": built.config.eval.split}
        about |= protocol(data)
        pictures = self.pictures(built, world, options.extractor)
        last, given = last_given(condition, batch.target), given_again(batch)
        scores: list[Score] = []
        if isinstance(system, HasFrameNats):
            blocks = blocks_of(
                built, data, self.likelihood_clips or options.num_samples, seed=seed, size=options.batch_size,
                rank=world.rank, world=world.world,
            )  # fmt: skip
            scores += frame_scores(
                system, blocks, given=given, reference=other, about=about, seed=seed, world=world,
            )  # fmt: skip
        about |= system.sample_fields  # nats and bits do not depend on them
        if last is not None:
            scores += curve_scores(fake, batch.target, last, given=given, network=pictures, about=about)
        if given:
            scores += given_scores(fake, batch.target, given, about=about, seed=seed)
        if fake.shape[1] > 1:
            scores += motion_scores(fake, batch.target, about=about)
        scores += self.masks(system, condition, fake, batch.truth.get("mask"), ids=ids, about=about, options=options)
        real = batch.target[: len(data)]  # conditions may be used again; clips are compared
        if min(len(real), len(other)) >= KVD_ROWS:
            network = self.network(built, world, pictures)
            scores += fvd_scores(fake, real, other, network=network, about=about, seed=seed)
        if len(condition) > 1:
            probe = condition.index(slice(0, SENSITIVITY_ROWS))
            for one in condition_sensitivity(system, probe, seed=seed):
                scores += one.scores(seed=seed, rows=len(probe), about=about)
        return scores

    def pictures(self, built: Built, world: World, name: str) -> Extractor:
        """The features of single frames. "own" is trained on the middle frames of the training clips."""
        assert isinstance(built.train_data, RowDataset)
        about = {"data": built.config.data_name, "split": "train"}
        train = MiddleFrames(built.train_data)
        return main_first(world, name == "own", lambda: extractor(name, train=train, about=about, device=world.device))

    def network(self, built: Built, world: World, pictures: Extractor) -> ClipExtractor:
        """The features of FVD and KVD."""
        assert isinstance(built.train_data, RowDataset)
        train, about = built.train_data, {"data": built.config.data_name, "split": "train"}
        return main_first(
            world, self.fvd == "own",
            lambda: clip_extractor(self.fvd, pictures=pictures, train=train, about=about, device=world.device),
        )  # fmt: skip

    def masks(
        self, system: System, condition: Condition, fake: Tensor, truth: Tensor | None, *, ids: Sequence[int],
        about: dict[str, str], options: Any,
    ) -> list[Score]:  # fmt: skip
        """mask_auc and mask_iou: against the true masks of the clips where a frame of them was given, and against what
        moves in the sample itself (`/own-motion`), which needs no truth."""
        if not isinstance(system, HasStreams) or len(fake) < 2:
            return []
        parts = sample_streams(system, condition, seed=options.seed, ids=ids, batch_size=options.batch_size)
        if "mask" not in parts:
            return []
        mask = (parts["mask"] + 1) / 2
        known = {"own-motion": moving_pixels(fake)}
        if truth is not None and (condition.frames is not None or condition.image is not None):
            known = {"": truth, "first-frame": truth[:, :1], **known}
        scores: list[Score] = []
        for name, wanted in known.items():
            if 0 < int((wanted > 0.5).sum()) < wanted.numel():
                scores += mask_scores(mask[:, : wanted.shape[1]], wanted, about=about, of=name, seed=options.seed)
        return scores


def main_first(world: World, trains: bool, make: Callable[[], Made]) -> Made:
    """What `make` gives; where it trains something that is kept on disk, rank 0 does it and the others read that."""
    if trains and world.world > 1:
        if world.is_main:
            make()
        world.barrier()
    return make()


def protocol(data: RowDataset) -> dict[str, str]:
    """How clips are cut out of their files, of the data sets that can do it in several ways: two scores of one clip at
    another rate, or after another past, are two different quantities."""
    given = data.provides.frames
    found = {"past": str(given.frames)} if given is not None else {}
    about: dict[str, Any] = vars(data)
    if "stride" in about:
        found["stride"] = str(about["stride"])
    if about.get("fps"):
        found["fps"] = f"{about['fps']:g}"
    if "window" in about:
        found["window"] = "first" if about["window"] == "first" else "centre"
    return found


def given_again(batch: Batch) -> int:
    """Frames of the condition that the clips start with (data.overlap=true), less than all of them; otherwise 0."""
    condition, target = batch.condition, batch.target
    past = condition.frames.pixels if condition.frames is not None else None
    if past is None or past.shape[2:] != target.shape[2:] or past.shape[1] >= target.shape[1]:
        return 0
    return past.shape[1] if torch.equal(pixels_to_float(past), target[:, : past.shape[1]]) else 0


def last_given(condition: Condition, target: Tensor) -> Tensor | None:
    """(N, C, H, W) the newest past frame, or the source picture, at the size of the clips; None without either."""
    pixels = None
    if condition.frames is not None:
        pixels = condition.frames.pixels[:, -1]
    elif condition.image is not None:
        pixels = condition.image.pixels
    if pixels is None or pixels.shape[1] != target.shape[2]:
        return None
    return resize(pixels_to_float(pixels), (target.shape[-2], target.shape[-1])).to(torch.float32)
