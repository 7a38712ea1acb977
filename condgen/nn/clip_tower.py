"""A small convolutional encoder from clips to vectors: the network of a user's own FVD."""

from __future__ import annotations

from torch import Tensor, nn

from condgen.nn.image_tower import LAST, halvings, resize


class ClipTower(nn.Module):
    """3-D convolutions with batch norm down to 4 x 4, then means over time: clips of any length >= 1.

    Frames of another side are resized to `size` first (bilinear, antialiased). Time is halved once, at the second
    level, where there are frames to halve. Shapes: float (B, T, channels, H, W) in [-1, 1] -> (B, dim).
    """

    def __init__(self, *, channels: int, dim: int, width: int = 16, size: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        now = channels
        for stage in range(halvings(size)):
            out = width * min(2**stage, 4)
            stride = (2 if stage == 1 else 1, 2, 2)
            layers += [
                nn.Conv3d(now, out, (3, 4, 4), stride, (1, 1, 1), bias=False), nn.BatchNorm3d(out), nn.ReLU(),
            ]  # fmt: skip
            now = out
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(now * LAST * LAST, dim))

    def features(self, clips: Tensor) -> Tensor:
        """What the last linear layer sees, (B, d)."""
        frames = resize(clips.flatten(0, 1), self.size)
        found: Tensor = self.convolutions(frames.unflatten(0, clips.shape[:2]).transpose(1, 2))
        return found.mean(2).flatten(1)

    def forward(self, clips: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(clips))
        return out
