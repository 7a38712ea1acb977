"""The clip network of the user's own data: trained on real training clips, kept, never comparable with papers.

Data with labels get a classifier of their classes. Others get one that tells what was done to a clip: by how many
quarter turns it was rotated, and whether its frames run as they did, stand still, or were put in another order (after
Misra et al. 2016, arXiv:1603.08561). Backwards is not among them: much that moves looks alike in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import RowDataset, too_many_bad
from condgen.errors import DataError
from condgen.metrics import fit, kept
from condgen.nn.clip_tower import ClipTower
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.types import ConditionSpec, Sample

RECIPE = 1  # part of the key: a changed recipe is another network
STEM = "clips"
TURNS = 4
MOST_BYTES = 2**30  # of clips that are held in memory for training


@dataclass(frozen=True)
class ClipOptions:
    """The shape of the network and how it is trained. size: side of the frames it sees, in pixels."""

    steps: int = 300
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    width: int = 16
    size: int = 32
    dropout: float = 0.3


class ClipJudge(nn.Module):
    """float clips (B, T, C, H, W) in [-1, 1] -> logits of `classes`. what: "classes" or "order"."""

    def __init__(self, options: ClipOptions, *, channels: int, classes: int, what: str) -> None:
        super().__init__()
        self.options, self.channels, self.classes, self.what = options, channels, classes, what
        self.tower = ClipTower(
            channels=channels, dim=classes, width=options.width, size=options.size, dropout=options.dropout
        )

    def forward(self, clips: Tensor) -> Tensor:
        out: Tensor = self.tower(clips)
        return out

    @property
    def fingerprint(self) -> str:
        """Hash of every weight."""
        return kept.fingerprint(self)


def load_clip_network(folder: Path) -> ClipJudge:
    """What `own_clip_network` has kept, in `clips.safetensors` and `clips.json`. Raises CheckpointError."""

    def make(sizes: Mapping[str, Any]) -> ClipJudge:
        return ClipJudge(
            ClipOptions(**sizes["options"]), channels=sizes["channels"], classes=sizes["classes"], what=sizes["what"]
        )

    return kept.read(folder, STEM, make)[0].eval()


def own_clip_network(
    data: RowDataset,
    folder: Path,
    *,
    about: Mapping[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: ClipOptions | None = None,
    say: Callable[[str], None] = print,
) -> ClipJudge:
    """The network for this training split; trained unless `folder` has it. about: name of the data, part of the key.

    Raises DataError where fewer than 2 clips can be read.
    """
    chosen, label = options or ClipOptions(), data.provides.label
    key: dict[str, Any] = {
        **about, "data_fingerprint": data.fingerprint, "rows": len(data), "shape": list(data.target.shape),
        "labels": label.num_classes if label is not None else 0, "seed": seed, "recipe": RECIPE,
        "options": asdict(chosen),
    }  # fmt: skip

    def save(made: ClipJudge, place: Path) -> None:
        sizes = {"options": asdict(chosen), "channels": made.channels, "classes": made.classes, "what": made.what}
        kept.write(place, STEM, made, {**sizes, "about": key})

    return fit.cached(
        folder, STEM, key, load=lambda place: load_clip_network(place).to(device), save=save, say=say,
        train=lambda: train_clip_network(data, seed=seed, device=device, options=chosen),
        what=f"{len(data)} real clips ({chosen.steps} steps)",
    )  # fmt: skip


class MiddleFrames(RowDataset):
    """The middle frame of each clip: what a picture network of the user's own is trained on."""

    def __init__(self, clips: RowDataset) -> None:
        self.clips = clips
        self.provides = ConditionSpec(label=clips.provides.label)
        self.target = replace(clips.target, frames=0)

    def __len__(self) -> int:
        return len(self.clips)

    def key(self, index: int) -> str:
        return self.clips.key(index)

    @property
    def fingerprint(self) -> str:
        return f"{self.clips.fingerprint}-middle"

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        found = self.clips.sample(index, random)
        return Sample(found.key, found.target[len(found.target) // 2], label=found.label)


def train_clip_network(
    data: RowDataset, *, seed: int = 0, device: torch.device | str = "cpu", options: ClipOptions | None = None
) -> ClipJudge:
    """A function of the arguments; the global random state is left as it was."""
    chosen = options or ClipOptions()
    clips, labels = load_clips(data, chosen.size, seed=seed)
    count, what = (int(data.provides.label.num_classes), "classes") if data.provides.label else (0, "order")
    count = count or TURNS * len(orders(clips.shape[1]))
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(rng.derive(seed, STEM))
        made = ClipJudge(chosen, channels=clips.shape[2], classes=count, what=what).to(device)
        _fit(made, clips, labels if what == "classes" else None, rng.generator(seed, "clip batches"))
    return made.eval()


def load_clips(data: RowDataset, size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 clips (N, T, C, size, size) and labels (N,), -1 = none, of as many rows as `MOST_BYTES` hold."""
    shape = data.target.shape
    most = max(2, MOST_BYTES // (shape[0] * shape[1] * size * size))
    rows = rng.permutation(len(data), seed, "clip network rows")[:most].tolist()
    clips, labels, bad = [], [], 0
    for row in rows:
        try:
            sample = data.sample(row, None)
        except DataError:
            bad += 1
            continue
        if sample.target.dim() == 4 and (sample.label is not None or data.provides.label is None):
            frames = pixels_to_float(sample.target)
            small = F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False)
            clips.append(pixels_to_uint8(small))
            labels.append(-1 if sample.label is None else int(sample.label))
    if too_many_bad(bad, len(rows)) or len(clips) < 2:
        raise DataError(f"a network of your own clips needs clips; of {len(rows)} rows {bad} could not be read")
    return torch.stack(clips), torch.tensor(labels)


def orders(frames: int) -> tuple[str, ...]:
    """What can be done to the frames of a clip so that it shows."""
    return ("as it is", "still", "shuffled")[: min(frames, 3)]


def disturbed(clips: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Square clips (B, T, C, S, S) -> each turned and reordered by chance, and what was done (B,): turn + 4 order."""
    frames, done = clips.shape[1], []
    made = torch.empty_like(clips)
    names = orders(frames)
    for row, clip in enumerate(clips):
        turn = int(torch.randint(TURNS, (), generator=draws))
        order = int(torch.randint(len(names), (), generator=draws))
        made[row] = reordered(clip, names[order], draws).rot90(turn, (2, 3))
        done.append(turn + TURNS * order)
    return made, torch.tensor(done)


def reordered(clip: Tensor, how: str, draws: torch.Generator) -> Tensor:
    """One clip (T, C, H, W). A shuffle never runs in order, forwards or backwards."""
    frames = len(clip)
    if how == "still":
        at = int(torch.randint(frames, (), generator=draws))
        return clip[at : at + 1].expand_as(clip)
    if how == "shuffled":
        order = torch.arange(frames)
        while (order.diff() > 0).all() or (order.diff() < 0).all():
            order = torch.randperm(frames, generator=draws)
        return clip[order]
    return clip


def _fit(made: ClipJudge, clips: Tensor, labels: Tensor | None, draws: torch.Generator) -> None:
    options, device = made.options, next(made.parameters()).device
    optimizer = torch.optim.AdamW(made.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    def loss(rows: Tensor) -> Tensor:
        pixels, wanted = pixels_to_float(clips[rows]), labels[rows] if labels is not None else None
        if wanted is None:
            pixels, wanted = disturbed(pixels, draws)
        motion = fit.motions(len(rows), draws).repeat_interleave(pixels.shape[1], 0)  # all frames alike
        seen = fit.moved(pixels.flatten(0, 1), motion).view_as(pixels)
        return F.cross_entropy(made(seen.to(device)), wanted.to(device))

    fit.fit(
        made, len(clips), loss, optimizer=optimizer, schedule=fit.cosine(optimizer, options.steps),
        steps=options.steps, batch_size=options.batch_size, draws=draws,
    )  # fmt: skip
