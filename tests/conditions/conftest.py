"""One condition with every field, and the spec that fits it."""

import pytest
import torch

from condgen.types import (
    Boxes,
    BoxesSpec,
    Condition,
    ConditionSpec,
    Frames,
    FramesSpec,
    Image,
    ImageSpec,
    Keypoints,
    KeypointsSpec,
    LabelSpec,
    Text,
    TextSpec,
)

FULL_SPEC = ConditionSpec(
    label=LabelSpec(5),
    text=TextSpec(pooled=12, tokens=8, length=6),
    boxes=BoxesSpec(max_boxes=3, num_classes=4),
    keypoints=KeypointsSpec(num_points=4, flip_pairs=((0, 1),)),
    image=ImageSpec(3, 16, 16, mask=True),
    frames=FramesSpec(3, 3, 16, 16, actions=2),
)


def make_condition(rows: int = 4, seed: int = 0) -> Condition:
    """Every field of FULL_SPEC; each row has given and masked entries, the first entry is always given."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(rows, *shape, generator=g)

    def flags(n: int) -> torch.Tensor:
        out = torch.rand(rows, n, generator=g) < 0.6
        out[:, 0], out[:, -1] = True, False
        return out

    low = rand(3, 2) * 0.5
    return Condition(
        label=torch.randint(5, (rows,), generator=g),
        text=Text(rand(12) + 0.1, rand(6, 8) - 0.5, flags(6), tuple(f"caption {i}" for i in range(rows))),
        boxes=Boxes(
            torch.cat([low, low + 0.15 + rand(3, 2) * 0.3], -1), flags(3), torch.randint(4, (rows, 3), generator=g)
        ),
        keypoints=Keypoints(rand(4, 2), flags(4)),
        image=Image(rand(3, 16, 16) * 2 - 1, (rand(1, 16, 16) < 0.7).float()),
        frames=Frames(rand(3, 3, 16, 16) * 2 - 1, flags(3), rand(3, 2)),
    )


@pytest.fixture
def full_spec() -> ConditionSpec:
    return FULL_SPEC


@pytest.fixture
def make():
    return make_condition
