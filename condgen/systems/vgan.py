"""Clips from a moving foreground, its mask and a still background, with a 3-D discriminator: VGAN.

Vondrick, Pirsiavash, Torralba 2016, "Generating Videos with Scene Dynamics", NIPS, arXiv:1609.02612. Without a source
it draws clips from noise; with a picture or past frames as the condition it is their model of the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import AdversarialLoss, fake_loss, generator_loss, real_loss
from condgen.nn.vgan_nets import Encoder, Moving, Size, Still, Streams, Trunk, compose, initialise
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

SOURCES = ("image", "frames")
NOISE, WIDTH, MASK_WEIGHT, FIRST_WEIGHT = 100, 64, 0.1, 10.0  # as published


class Vgan(System):
    """streams="two" is the paper's main model, "one" its ablation. A source is the condition `image` or `frames`.

    streams      "two": mask x foreground + (1 - mask) x background; "one": the foreground alone
    noise_dim    width of z, N(0, 1); null = 100, or 0 with a source, as released: a frame then has one future
    generator_width, discriminator_width   channels of the finest level, doubled at each coarser one; null = 64, or 128
                 with a source, as published
    text_width   of a learned projection of the sentence; 0 = as it is
    loss         "bce" as published (a softmax of two classes is the same), or "hinge", "lsgan"
    mask_weight  of the mean of the mask, which draws it towards the background; null = 0.1, or 0 with a source. It is
                 the mean and not the sum: a sum of that weight closes the mask at once
    first_weight of the mean absolute difference between the first frames and the true ones, with a source; 10
                 published. Where the clip starts with the source (data.overlap=true) that is |G(x)[0] - x|
    first_frames frames that this term covers: 1 as published

    The source enters the encoder (frames side by side on channels); label and text join the noise in G, and D's logit
    gains <V vector, features summed over positions> (Miyato, Koyama 2018, arXiv:1802.05637). As released D does not see
    the source: the clip shows it. D and G of one step share one generated batch, and D is evaluated anew for G.

    D's two outputs are the classes of the released softmax; their difference is the logit. Logged beside the losses:
    mask_mean, mask_low and mask_high, the mean and the ends of the mask; a mask of 1 everywhere means one stream.

    Clips (B, T, C, S, S), S = 8, 16, 32, 64, ...; sample: (B, T, C, S, S) in [-1, 1].
    """

    consumes: ClassVar[tuple[str, ...]] = ("temporal", "vector", "map")
    reads: ClassVar[tuple[str, ...] | None] = ("label", "text", "image", "frames")
    generates: ClassVar[tuple[str, ...]] = ("generator",)
    makes: ClassVar[Literal["pictures", "clips"]] = "clips"

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        streams: Literal["two", "one"] = "two",
        noise_dim: Annotated[int | None, Range(0)] = None,
        generator_width: Annotated[int | None, Range(1)] = None,
        discriminator_width: Annotated[int | None, Range(1)] = None,
        text_width: Annotated[int, Range(0)] = 128,
        loss: AdversarialLoss = "bce",
        mask_weight: Annotated[float | None, Range(0)] = None,
        first_weight: Annotated[float, Range(0)] = FIRST_WEIGHT,
        first_frames: Annotated[int, Range(1)] = 1,
    ) -> None:
        super().__init__(condition=condition, target=target)
        size = _size(target)
        sourced = any(name in SOURCES for name in condition.given)
        self.noise_dim = noise_dim if noise_dim is not None else (0 if sourced else NOISE)
        width = generator_width or (2 * WIDTH if sourced else WIDTH)
        self.mask_weight = mask_weight if mask_weight is not None else (0.0 if sourced else MASK_WEIGHT)
        self.first_weight, self.first_frames = (first_weight if sourced else 0.0), first_frames
        self.loss, self.two = loss, streams == "two"
        if first_frames > target.frames:
            raise ConfigError(f"system.first_frames={first_frames}, but the clips have {target.frames} frames")
        if not self.two and mask_weight:
            raise ConfigError(f"system.mask_weight={mask_weight} with streams=one, which has no mask; leave it out")
        forms = {
            name: "map" if name == "image" else form for name, form in assign_forms(condition, self.consumes).items()
        }
        widths = {"text": text_width} if text_width else {}
        stack = ConditionStack(condition, forms, widths)
        vector = stack.widths["vector"]
        if not sourced and not self.noise_dim and not vector:
            raise ConfigError("system.noise_dim=0 without any condition: every clip would be the same")
        self.generator = Generator(
            stack if condition.given else None, condition, target, size,
            width=width, noise=self.noise_dim, two=self.two, sourced=sourced,
        )  # fmt: skip
        vectors = {name: form for name, form in forms.items() if form == "vector"}
        self.discriminator = Discriminator(
            ConditionStack(condition.only(tuple(vectors)), vectors, widths) if vectors else None,
            Trunk(target.channels, size, discriminator_width or (2 * WIDTH if sourced else WIDTH)),
        )

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("discriminator", self.discriminator_loss, trains=("discriminator",)),
            Phase("generator", self.generator_loss, trains=("generator",)),
        ]

    def shared(self, batch: Batch, random: StepRandom) -> Streams:
        """The generated clips of this step, with their graph; D's phase detaches them."""
        return self.generator(batch.condition, self._noise(random))

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(x) - log(1 - D(G)), each the mean over rows.

        Two passes, not one joined batch: D's batch norm must see one kind of clip at a time.
        """
        with torch.no_grad():
            fake = self._generated(batch, random).video.detach()
        losses = {
            "real": real_loss(self.discriminator(batch.target.transpose(1, 2), batch.condition), self.loss),
            "fake": fake_loss(self.discriminator(fake, batch.condition), self.loss),
        }
        return {"loss": losses["real"] + losses["fake"], **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(G) + mask_weight mean m + first_weight mean |G[0] - x[0]|."""
        made = self._generated(batch, random)
        losses = {"adversarial": generator_loss(self.discriminator(made.video, batch.condition), self.loss)}
        total = losses["adversarial"]
        if made.mask is not None:
            mask = made.mask.float()
            losses |= {"mask_mean": mask.mean(), "mask_low": mask.detach().amin(), "mask_high": mask.detach().amax()}
            if self.mask_weight:
                total = total + self.mask_weight * losses["mask_mean"]
        if self.first_weight:
            losses["first"] = self._first(made.video, batch.target)
            total = total + self.first_weight * losses["first"]
        return {"loss": total, **losses}

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        return self.generator(condition, self._noise(random)).video.transpose(1, 2).float()

    def streams(self, condition: Condition, *, random: Random) -> dict[str, Tensor]:
        """The clips of `sample` taken apart, each (B, T, C or 1, S, S) in [-1, 1]: video, foreground, mask (-1 =
        background), background. With one stream: video and foreground."""
        made = self.generator(condition, self._noise(random))
        found = {"video": made.video, "foreground": made.foreground}
        if made.mask is not None and made.background is not None:
            found["mask"] = made.mask.float() * 2 - 1
            found["background"] = made.background.expand_as(made.video)
        return {name: clip.transpose(1, 2).float() for name, clip in found.items()}

    def features(self, clips: Tensor) -> Tensor:
        """Clips (B, T, C, S, S) -> what D makes of them before its last layer (B, F, t, 4, 4)."""
        return self.discriminator.trunk(clips.transpose(1, 2))

    def _noise(self, random: Random) -> Tensor | None:
        return random.randn(self.noise_dim) if self.noise_dim else None

    def _first(self, video: Tensor, target: Tensor) -> Tensor:
        count = self.first_frames
        return (video[:, :, :count].float() - target[:, :count].transpose(1, 2).float()).abs().mean()

    def _generated(self, batch: Batch, random: StepRandom) -> Streams:
        return batch.shared if isinstance(batch.shared, Streams) else self.shared(batch, random)


class Generator(nn.Module):
    """Noise and condition -> streams. The code is (B, Z) without a source, (B, F, 4, 4) with one."""

    def __init__(
        self, stack: ConditionStack | None, condition: ConditionSpec, target: TargetSpec, size: Size, *,
        width: int, noise: int, two: bool, sourced: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stack = stack
        self.encoder: Encoder | None = None
        code = noise + (stack.widths["vector"] if stack is not None else 0)
        if sourced:
            assert stack is not None
            past = condition.frames.frames if condition.frames is not None else 0
            inputs = stack.widths["map"] + past * stack.widths["temporal"]
            self.encoder = Encoder(inputs, size, width)
            code += self.encoder.width
        self.moving = Moving(code, target.channels, size, width, mask=two, from_map=sourced)
        self.still = Still(code, target.channels, size, width, from_map=sourced) if two else None
        self.side, self.past = target.height, condition.frames.frames if condition.frames is not None else 0
        for part in (self.encoder, self.moving, self.still):
            if part is not None:
                part.apply(initialise)

    def forward(self, condition: Condition, noise: Tensor | None) -> Streams:
        code = self._code(condition, noise)
        foreground, mask = self.moving(code[:, :, None])
        if mask is None or self.still is None:
            return Streams(foreground, foreground, None, None)
        background = self.still(code)[:, :, None]
        return Streams(compose(foreground, mask, background), foreground, mask, background)

    def _code(self, condition: Condition, noise: Tensor | None) -> Tensor:
        """(B, Z, 1, 1) or (B, Z, 4, 4): what the source looks like, then noise and vector, the same everywhere."""
        side, parts = 1, []
        forms = None if self.stack is None else self.stack(condition, (self.side, self.side))
        if self.encoder is not None and forms is not None:
            pixels = [] if forms.map is None else [forms.map]
            if forms.temporal is not None:
                pixels.append(self._past(forms.temporal))
            parts.append(self.encoder(torch.cat(pixels, dim=1)))
            side = 4
        flat = [noise, None if forms is None else forms.vector]
        parts += [v[:, :, None, None].expand(-1, -1, side, side).to(v.dtype) for v in flat if v is not None]
        return torch.cat(parts, dim=1)

    def _past(self, frames: Tensor) -> Tensor:
        """(B, K, C, h, w) -> (B, K C, S, S). Raises ShapeError for another K or size than it was built for."""
        if tuple(frames.shape[1:2] + frames.shape[3:]) != (self.past, self.side, self.side):
            raise ShapeError(
                f"past frames of shape {tuple(frames.shape[1:])}; this system takes {self.past} of {self.side} px"
            )
        return frames.flatten(1, 2)


class Discriminator(nn.Module):
    """A clip (B, C, T, S, S) -> its logit (B,); with a stack also for the label and the text that it should show."""

    def __init__(self, stack: ConditionStack | None, trunk: Trunk) -> None:
        super().__init__()
        self.stack, self.trunk = stack, trunk
        self.judge = trunk.head(2)
        self.match = nn.Linear(stack.widths["vector"], trunk.width, bias=False) if stack is not None else None
        trunk.apply(initialise)
        initialise(self.judge)

    def forward(self, clip: Tensor, condition: Condition) -> Tensor:
        found = self.trunk(clip)
        two = self.judge(found).flatten(1).float()  # (B, 2): fake, real
        logit = two[:, 1] - two[:, 0]
        if self.stack is None or self.match is None:
            return logit
        wanted = self.match(self.stack(condition).vector).float()
        return logit + (wanted * found.float().sum((2, 3, 4))).sum(1)


def _size(target: TargetSpec) -> Size:
    side = target.height
    if not target.frames:
        raise ShapeError(
            "vgan makes clips; the data give pictures. Use clips: data=clips, moving_openmoji, moving_mnist"
        )
    if target.width != side or side < 8 or side & (side - 1):
        raise ShapeError(
            f"vgan makes square clips of 8, 16, 32, 64, ... px; the data give {target.height} x {target.width}. "
            "Set data.size"
        )
    return Size.of(side, target.frames)
