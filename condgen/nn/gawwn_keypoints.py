"""Keypoint-conditional networks of GAWWN (Reed et al. 2016, arXiv:1610.02454), layer for layer as released.

Each part is a map of its own; the local path is gated by the union of the maps (`conditions.keypoints.union_map`).
A part that is not given is an empty map. `grid` as in `condgen.nn.gawwn_box`.

people   the networks for MPII instead of those for CUB. G: no batch norm and ReLU before the code is gated, and a
         residual block after; D: ELU instead of leaky ReLU, and dropout of the whole-picture path
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.gawwn_parts import Trunk, down, grid_of, head, paint, projected, starts, up
from condgen.nn.initialise import initialise
from condgen.nn.reed import Bottleneck, leaky, relu

DROPOUT = 0.2


class Generator(nn.Module):
    """noise (B, Z), words (B, V), maps (B, K, grid, grid), gate (B, 1, grid, grid) -> (B, C, S, S) in [-1, 1]."""

    def __init__(
        self,
        vector_dim: int,
        points: int,
        side: int,
        channels: int,
        width: int,
        noise_dim: int,
        *,
        people: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid_of(side)
        g, fine = width, self.grid == 16
        self.words, self.noise = nn.Linear(vector_dim, 4 * g), nn.Linear(noise_dim, 4 * g)
        spread = [] if people else [nn.BatchNorm1d(4 * g), relu()]
        self.local_code = nn.Sequential(nn.Linear(8 * g, 4 * g), *spread)
        self.local = nn.Sequential(
            nn.ConvTranspose2d(4 * g, 4 * g, 3, 1, 1), nn.BatchNorm2d(4 * g), relu(),
            *([Bottleneck(4 * g, g, relu)] if people else []),
        )  # fmt: skip
        halvings = [points, g, 2 * g] if fine else [points, 2 * g]
        self.global_encode = nn.Sequential(
            *itertools.chain.from_iterable(down(a, b, relu) for a, b in itertools.pairwise(halvings)),
            nn.Conv2d(2 * g, 4 * g, 4), nn.BatchNorm2d(4 * g), relu(),
        )  # fmt: skip
        self.global_code = nn.Sequential(nn.Linear(8 * g, 4 * g), nn.BatchNorm1d(4 * g), relu())
        doublings = [4 * g, 2 * g, g] if fine else [4 * g, g]
        self.global_decode = nn.Sequential(
            *starts(8 * g, 4 * g), relu(),
            *itertools.chain.from_iterable([*up(a, b), relu()] for a, b in itertools.pairwise(doublings)),
        )  # fmt: skip
        self.merge = nn.Sequential(
            nn.ConvTranspose2d(5 * g + points, 4 * g, 3, 1, 1), nn.BatchNorm2d(4 * g), relu(),
            nn.ConvTranspose2d(4 * g, 4 * g, 3, 1, 1), nn.BatchNorm2d(4 * g),
            Bottleneck(4 * g, g, relu),
        )  # fmt: skip
        self.paint = paint(side // self.grid, 4 * g, (2 * g, g), channels)
        self.apply(initialise)

    def forward(self, noise: Tensor, vector: Tensor, maps: Tensor, gate: Tensor) -> Tensor:
        words = self.words(vector)
        code = F.relu(torch.cat([self.noise(noise.to(words.dtype)), words], dim=1))
        maps = maps.to(code.dtype)
        scene = self.global_decode(
            torch.cat([self.global_encode(maps), self.global_code(code)[:, :, None, None]], dim=1)
        )
        things = self.local(self.gated(code, gate.to(code.dtype)))
        return self.paint(self.merge(torch.cat([scene, things, maps], dim=1)))

    def gated(self, code: Tensor, gate: Tensor) -> Tensor:
        """(B, 4g, grid, grid): the code where any part is, zeros elsewhere."""
        return self.local_code(code)[:, :, None, None] * gate


class Discriminator(nn.Module):
    """pixels (B, C, S, S), words (B, V), maps (B, K, grid, grid), gate (B, 1, grid, grid) -> logits (B,).

    projection  the logit gains <V words, scene features> (Miyato, Koyama 2018, arXiv:1802.05637)
    """

    def __init__(
        self,
        vector_dim: int,
        points: int,
        side: int,
        channels: int,
        width: int,
        condition_dim: int,
        *,
        people: bool = False,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid_of(side)
        d, fine = width, self.grid == 16
        act = nn.ELU if people else leaky
        self.act = act()
        self.words = nn.Sequential(nn.Linear(vector_dim, condition_dim), act())
        self.trunk = Trunk(side, channels, d, act)
        self.region_joint = nn.Sequential(
            nn.Conv2d(2 * d + condition_dim, 2 * d, 3, padding=1), nn.BatchNorm2d(2 * d), act()
        )
        self.region_score = nn.Sequential(
            nn.Conv2d(2 * d + points, 2 * d, 1), nn.BatchNorm2d(2 * d), act(), nn.Conv2d(2 * d, d, 1)
        )
        self.scene = nn.Sequential(
            *(down(2 * d, 4 * d, act) if fine else []), *down(4 * d if fine else 2 * d, 8 * d, act)
        )
        self.global_joint = nn.Sequential(
            nn.Conv2d(8 * d + condition_dim, 4 * d, 1), nn.BatchNorm2d(4 * d), act(),
            nn.Conv2d(4 * d, d, 4), nn.BatchNorm2d(d), act(), *([nn.Dropout(DROPOUT)] if people else []),
        )  # fmt: skip
        self.head = head(d, act)
        self.match = nn.Linear(vector_dim, 8 * d, bias=False) if projection else None
        self.apply(initialise)

    def forward(self, pixels: Tensor, vector: Tensor, maps: Tensor, gate: Tensor) -> Tensor:
        features, words = self.trunk(pixels), self.words(vector)[:, :, None, None]
        maps, words = maps.to(features.dtype), words.to(features.dtype)
        told = words.expand(-1, -1, self.grid, self.grid)
        joint = self.region_joint(torch.cat([features, told], dim=1)) * gate.to(features.dtype)
        region = self.act(self.region_score(torch.cat([joint, maps], dim=1)).mean((2, 3)))
        scene = self.scene(features)
        whole = self.global_joint(torch.cat([scene, words.expand(-1, -1, 4, 4)], dim=1)).flatten(1)
        logits = self.head(torch.cat([region, whole], dim=1)).flatten()
        return logits if self.match is None else logits + projected(self.match(vector), scene)
