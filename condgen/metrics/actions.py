"""Action recognition with a discriminator's features: fine-tuned from a run, and from random weights, equal budget.

The test of representations of Vondrick et al. 2016 (arXiv:1609.02612): the last layer is replaced by dropout 0.5 and a
layer of K classes, and everything is trained on the labels; Adam 2e-4, beta1 0.5, at most 1,000 steps of 256 clips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen import rng
from condgen.data.base import RowDataset
from condgen.errors import ConfigError, DataError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.pixels import pixels_to_float
from condgen.systems.base import HasFeatures, System

MAX_CLIPS = 10_000


@dataclass(frozen=True)
class ActionOptions:
    """share: of the labelled training clips that are used (the paper also has 1/8)."""

    steps: int = 1000
    batch_size: int = 64
    lr: float = 2e-4
    dropout: float = 0.5
    share: float = 1.0
    seed: int = 0


class ActionNet(nn.Module):
    """Features of a system's discriminator, dropout and a linear layer of K classes over all of them."""

    def __init__(self, system: System, shape: tuple[int, ...], classes: int, dropout: float) -> None:
        super().__init__()
        if not isinstance(system, HasFeatures):
            raise ConfigError(f"{type(system).__name__} has no features of clips; vgan has")
        self.system = copy.deepcopy(system)
        with torch.no_grad():
            width = self.system.eval().features(torch.zeros(1, *shape)).numel()
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, classes)

    def forward(self, clips: Tensor) -> Tensor:
        found = self.system.features(clips).flatten(1).float()
        out: Tensor = self.head(self.dropout(found))
        return out


def load_clips(data: RowDataset, *, seed: int = 0, most: int = MAX_CLIPS) -> tuple[Tensor, Tensor]:
    """uint8 or float clips (N, T, C, H, W) and labels (N,), at most `most`. Raises DataError below 2."""
    clips, labels = [], []
    for row in rng.permutation(len(data), seed, "action rows").tolist()[:most]:
        try:
            sample = data.sample(row, None)
        except DataError:
            continue
        if sample.label is not None and sample.target.dim() == 4:
            clips.append(sample.target)
            labels.append(sample.label)
    if len(clips) < 2:
        raise DataError(f"{len(clips)} of {len(data)} rows are clips with a label; action recognition needs them")
    return torch.stack(clips), torch.tensor(labels)


def train_actions(net: ActionNet, clips: Tensor, labels: Tensor, options: ActionOptions) -> ActionNet:
    """Trains all of it in place; batches are a function of the seed."""
    device = net.head.weight.device
    trained = [*net.head.parameters(), *net.system.get_submodule("discriminator").parameters()]
    optimizer = torch.optim.Adam(trained, options.lr, betas=(0.5, 0.999))
    draws = rng.generator(options.seed, "action batches")
    net.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(rng.derive(options.seed, "action dropout"))
        for _ in range(options.steps):
            at = torch.randint(len(clips), (min(options.batch_size, len(clips)),), generator=draws)
            loss = F.cross_entropy(net(pixels_to_float(clips[at]).to(device)), labels[at].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: ActionNet, clips: Tensor, labels: Tensor, batch_size: int = 32) -> float:
    """Share of clips whose class is named."""
    device = net.head.weight.device
    right = 0
    for part, wanted in zip(clips.split(batch_size), labels.split(batch_size), strict=True):
        right += int((net(pixels_to_float(part).to(device)).argmax(1).cpu() == wanted).sum())
    return right / len(labels)


def action_scores(
    trained: System,
    fresh: System,
    train: RowDataset,
    test: RowDataset,
    *,
    about: Mapping[str, str],
    options: ActionOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Score]:
    """action_accuracy: `trained`'s discriminator fine-tuned. Its floor is `fresh`, the same network from random weights
    under the same budget, so that value - floor is what the training without labels was worth; no ceiling.
    `action_accuracy/chance` is the share of the commonest class. Both systems are left as they are."""
    chosen = options or ActionOptions()
    label = train.provides.label
    if label is None:
        raise DataError("action recognition needs data with labels; class folders give them")
    clips, labels = load_clips(train, seed=chosen.seed)
    kept = max(2, round(chosen.share * len(clips)))
    clips, labels = clips[:kept], labels[:kept]
    held, wanted = load_clips(test, seed=chosen.seed)
    found = []
    for name, system in (("fine-tuned", trained), ("from random weights", fresh)):
        torch.manual_seed(rng.derive(chosen.seed, "action head"))
        net = ActionNet(system, tuple(clips.shape[1:]), label.num_classes, chosen.dropout)
        net.to(next(system.parameters()).device)
        found.append(accuracy(train_actions(net, clips, labels, chosen), held, wanted))
        say(f"{name}: {found[-1]:.3f} of {len(held)} held-out clips, from {len(clips)} labelled ones")
    fields = {
        **about, "n": str(len(held)), "classes": str(label.num_classes), "labelled": str(len(clips)),
        "steps": str(chosen.steps), "batch": str(chosen.batch_size), "lr": f"{chosen.lr:g}", "seed": str(chosen.seed),
    }  # fmt: skip
    error = (found[0] * (1 - found[0]) / len(held)) ** 0.5
    chance = float(wanted.bincount().max() / len(wanted))
    return [
        Score(
            "action_accuracy", found[0], floor=found[1], error=error,
            signature=signature("action_accuracy", **fields, floor="random-weights"),
        ),
        Score("action_accuracy/chance", chance, signature=signature("action_accuracy/chance", **fields)),
    ]  # fmt: skip
