"""Keypoints: named points -> raw coordinates, one map per point, or one token per point."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from condgen.conditions._features import expect_map_size, expect_size, null_sequence, null_vector
from condgen.conditions.base import ConditionKind, Feature
from condgen.errors import ConfigError
from condgen.nn.fourier import fourier_features, fourier_width
from condgen.types import Condition, KeypointsSpec

DEFAULT_WIDTH = 64
RENDERINGS = ("cell", "released", "gaussian")


class KeypointMaps(ConditionKind):
    """keypoints -> vector (B, 3K): x, y, visible of each point as they are, or a linear map of them to `width`;
    map (B, K, h, w): one channel per point, or (B, width, h, w); sequence (B, K, width): one token per point from
    Fourier features and a learned embedding of the part, 64 wide by default.

    render   how a map shows a point: "cell" sets the cell that holds it; "released" the cell of GAWWN's code
             (Reed et al. 2016, arXiv:1610.02454), which rounds and so sits half a cell up and left of it;
             "gaussian" a heatmap of height 1, which passes gradients
    sigma    width of the heatmap in cells
    bands    octaves of the Fourier features
    """

    field: ClassVar[str] = "keypoints"
    forms: ClassVar[tuple[str, ...]] = ("vector", "map", "sequence")

    def __init__(
        self,
        spec: KeypointsSpec,
        form: str,
        *,
        width: int | None = None,
        nullable: bool = False,
        render: Literal["cell", "released", "gaussian"] = "cell",
        sigma: float = 1.0,
        bands: int = 6,
    ) -> None:
        super().__init__(spec, form, width=width, nullable=nullable)
        if render not in RENDERINGS or sigma <= 0:
            raise ConfigError(
                f"keypoints render={render!r}, sigma={sigma}; choose {', '.join(RENDERINGS)} and sigma > 0"
            )
        self.points, self.render, self.sigma, self.bands = spec.num_points, render, sigma, bands
        self.project: nn.Linear | None = None
        if form == "sequence":
            self.width = width or DEFAULT_WIDTH
            self.token = nn.Linear(fourier_width(2, bands), self.width)
            self.part = nn.Parameter(torch.randn(self.points, self.width) * 0.02)
        else:
            natural = 3 * self.points if form == "vector" else self.points
            self.width = width or natural
            self.project = nn.Linear(natural, width, bias=form == "vector") if width else None
        self.null = nn.Parameter(torch.zeros(self.width)) if nullable and form != "map" else None

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        points = condition.keypoints
        assert points is not None
        expect_size("the number of keypoints", points.xy.shape[1], self.points)
        visible = points.visible & condition.is_present("keypoints")[:, None]
        xy = torch.where(visible[..., None], points.xy, torch.zeros_like(points.xy)).to(torch.float32)
        if self.form == "map":
            maps = point_maps(xy, visible, expect_map_size(size), render=self.render, sigma=self.sigma)
            if self.project is not None:
                maps = self.project(maps.movedim(1, -1)).movedim(-1, 1)
            return Feature(maps)
        if self.form == "vector":
            vector = torch.cat([xy, visible[..., None].to(xy.dtype)], dim=-1).flatten(1)
            vector = self.project(vector) if self.project is not None else vector
            return Feature(null_vector(vector, visible.any(1), self.null))
        tokens = self.token(fourier_features(xy, self.bands)) + self.part
        return Feature(*null_sequence(tokens, visible, self.null))


def point_maps(
    xy: Tensor, visible: Tensor, size: tuple[int, int], *, render: str = "cell", sigma: float = 1.0
) -> Tensor:
    """Points (B, K, 2) in [0, 1] -> float32 (B, K, h, w) in [0, 1]; zeros where not visible. See `KeypointMaps`."""
    height, width = size
    columns = _profile(xy[..., 0].to(torch.float32), width, render, sigma)
    rows = _profile(xy[..., 1].to(torch.float32), height, render, sigma)
    maps = rows[..., :, None] * columns[..., None, :]
    return torch.where(visible[:, :, None, None], maps, torch.zeros_like(maps))


def union_map(maps: Tensor) -> Tensor:
    """(B, K, h, w) -> (B, 1, h, w): the gate of GAWWN. Points that share a cell count once."""
    return maps.amax(dim=1, keepdim=True).clamp(max=1)


def _profile(position: Tensor, cells: int, render: str, sigma: float) -> Tensor:
    """(B, K) in [0, 1] -> (B, K, cells): how strongly each cell of one axis shows the point."""
    cell = torch.arange(cells, device=position.device, dtype=torch.float32)
    if render == "gaussian":
        return torch.exp(-((cell + 0.5 - position[..., None] * cells) ** 2) / (2 * sigma**2))
    exact = position * cells
    # the released code counts cells from 1: clamp(round(cells * x), 1, cells)
    index = torch.floor(exact + 0.5) - 1 if render == "released" else torch.floor(exact)
    return (cell == index.clamp(0, cells - 1)[..., None]).to(torch.float32)
