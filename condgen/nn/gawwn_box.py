"""Box-conditional networks of GAWWN (Reed et al. 2016, arXiv:1610.02454), layer for layer as released.

A global path hears where the thing is from the sentence drawn into the box; a local path makes the thing itself
and draws it into the box with a spatial transformer. `grid` is the side of the map on which places are decided:
16 cells as published, 8 for pictures of 16 px.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn import spatial
from condgen.nn.gawwn_parts import Trunk, down, grid_of, head, paint, projected, starts, up
from condgen.nn.initialise import initialise
from condgen.nn.reed import Bottleneck, leaky, relu


class Generator(nn.Module):
    """noise (B, N, Z), words (B, V), boxes (B, N, 4), valid (B, N) -> (B, C, S, S) in [-1, 1]; N boxes.

    Every box has its own noise and all share the words. What the local path makes does not depend on the box, so
    that the batch norm of rows without a box sees the same distribution; only the mean over boxes leaves them out.
    """

    def __init__(self, vector_dim: int, side: int, channels: int, width: int, noise_dim: int) -> None:
        super().__init__()
        self.grid = grid_of(side)
        g, fine = width, self.grid == 16
        self.words = nn.Linear(vector_dim, 4 * g)  # shared by both paths
        self.noise_global = nn.Linear(noise_dim, 4 * g)
        self.noise_local = nn.Linear(noise_dim, 4 * g)
        halvings = [4 * g] * (3 if fine else 2)
        self.global_encode = nn.Sequential(
            *itertools.chain.from_iterable(down(a, b, relu) for a, b in itertools.pairwise(halvings)),
            nn.Conv2d(4 * g, 4 * g, 4), nn.BatchNorm2d(4 * g), relu(),
        )  # fmt: skip
        doublings = [8 * g, 4 * g, 2 * g] if fine else [8 * g, 2 * g]
        self.global_decode = nn.Sequential(
            *starts(8 * g, 8 * g), relu(),
            *itertools.chain.from_iterable([*up(a, b), relu()] for a, b in itertools.pairwise(doublings)),
        )  # fmt: skip
        local: list[nn.Module] = [*starts(8 * g, 8 * g)]
        for before, after in itertools.pairwise(doublings):
            local += [Bottleneck(before, before // 4, relu), *up(before, after)]
        self.local = nn.Sequential(*local)
        self.merge = nn.Sequential(nn.ConvTranspose2d(4 * g, 2 * g, 3, 1, 1), nn.BatchNorm2d(2 * g), relu())
        self.paint = paint(side // self.grid, 2 * g, (g, max(g // 4, 1)), channels)
        self.apply(initialise)

    def forward(self, noise: Tensor, vector: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        words = self.words(vector)
        where = self.draw_global(noise, words, boxes, valid)
        return self.join(where, self.draw_local(noise, words, boxes, valid))

    def draw_global(self, noise: Tensor, words: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """(B, 2g, grid, grid): the scene around the boxes."""
        # the sentence is the same in every cell: paste a map of ones and multiply
        ones = words.new_ones(*valid.shape, 1, self.grid, self.grid)
        region = spatial.mean_of_valid(spatial.paste(ones, boxes, valid), spatial.usable(boxes, valid))
        place = self.global_encode(words[:, :, None, None] * region)
        z = F.relu(self.noise_global(noise[:, 0].to(words.dtype)))[:, :, None, None]
        return self.global_decode(torch.cat([place, z], dim=1))

    def draw_local(self, noise: Tensor, words: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """(B, 2g, grid, grid): what is inside the boxes, zeros outside."""
        rows, count = valid.shape
        z = self.noise_local(noise.to(words.dtype))
        code = F.relu(torch.cat([z, words[:, None].expand(-1, count, -1)], dim=-1))
        made = self.local(code.flatten(0, 1)[:, :, None, None])
        placed = spatial.paste(made.view(rows, count, *made.shape[1:]), boxes, valid)
        return F.relu(spatial.mean_of_valid(placed, spatial.usable(boxes, valid)))

    def join(self, scene: Tensor, things: Tensor) -> Tensor:
        """The two maps of the paths -> pixels."""
        return self.paint(self.merge(torch.cat([scene, things], dim=1)))


class Discriminator(nn.Module):
    """pixels (B, C, S, S), words (B, V), boxes (B, N, 4), valid (B, N) -> logits (B,).

    text_map   how the global path's map of the words is placed: "crop" as released, which leaves the map constant
               except where a box reaches out of the picture, or "paste", which draws it into the box as in G
    projection  the logit gains <V words, scene features> (Miyato, Koyama 2018, arXiv:1802.05637)
    The region path sees the mean over valid boxes of what is inside them; one box is the published case.
    """

    def __init__(
        self,
        vector_dim: int,
        side: int,
        channels: int,
        width: int,
        condition_dim: int,
        *,
        text_map: str = "crop",
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.text_map = grid_of(side), text_map
        d, fine = width, self.grid == 16
        self.words = nn.Sequential(nn.Linear(vector_dim, condition_dim), leaky())
        self.trunk = Trunk(side, channels, d)
        self.region_joint = nn.Sequential(
            nn.Conv2d(2 * d + condition_dim, 2 * d, 3, padding=1), nn.BatchNorm2d(2 * d), leaky()
        )
        self.region_score = nn.Sequential(
            nn.Conv2d(2 * d, 2 * d, 1), nn.BatchNorm2d(2 * d), leaky(), nn.Conv2d(2 * d, d, 1)
        )
        self.scene = nn.Sequential(
            *(down(2 * d, 4 * d, leaky) if fine else []), *down(4 * d if fine else 2 * d, 8 * d, leaky)
        )
        self.text_place = nn.Sequential(
            *(down(condition_dim, 4 * d, relu) if fine else []), *down(4 * d if fine else condition_dim, d, relu)
        )
        self.global_joint = nn.Sequential(
            nn.Conv2d(9 * d, 4 * d, 1), nn.BatchNorm2d(4 * d), leaky(),
            nn.Conv2d(4 * d, d, 4), nn.BatchNorm2d(d), leaky(),
        )  # fmt: skip
        self.head = head(d)
        self.match = nn.Linear(vector_dim, 8 * d, bias=False) if projection else None
        self.apply(initialise)

    def forward(self, pixels: Tensor, vector: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        features, words = self.trunk(pixels), self.words(vector)
        scene = self.scene(features)
        both = torch.cat([self.region(features, words, boxes, valid), self.whole(scene, words, boxes, valid)], dim=1)
        logits = self.head(both).flatten()
        return logits if self.match is None else logits + projected(self.match(vector), scene)

    def region(self, features: Tensor, words: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """(B, d): what is inside the boxes, judged with the words."""
        told = words[:, :, None, None].expand(-1, -1, self.grid, self.grid)
        joint = self.region_joint(torch.cat([features, told.to(features.dtype)], dim=1))
        inside = spatial.mean_of_valid(spatial.crop(joint, boxes, valid), spatial.usable(boxes, valid))
        return F.leaky_relu(self.region_score(inside).mean((2, 3)), 0.2)

    def whole(self, scene: Tensor, words: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        """(B, d): the whole picture and where the words are."""
        ones = words.new_ones(len(words), 1, self.grid, self.grid)
        if self.text_map == "paste":
            placed = spatial.paste(ones[:, None].expand(-1, valid.shape[1], -1, -1, -1), boxes, valid)
        else:
            placed = spatial.crop(ones, boxes, valid)
        place = spatial.mean_of_valid(placed, spatial.usable(boxes, valid))
        told = self.text_place(words[:, :, None, None] * place)
        return self.global_joint(torch.cat([scene, told.to(scene.dtype)], dim=1)).flatten(1)
