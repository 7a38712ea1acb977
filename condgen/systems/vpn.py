"""Video pixel networks: clips from past frames, frame by frame and pixel by pixel, with exact likelihood.

Kalchbrenner, van den Oord, Simonyan, Danihelka, Vinyals, Graves, Kavukcuoglu 2017, "Video Pixel Networks", ICML,
arXiv:1610.00527. What was chosen where the paper is silent is said in docs/parity.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses.likelihood import bernoulli_log_prob, grey_entropy
from condgen.losses.logistic_mixture import quantise
from condgen.nn.incremental import PlainSteps, Steps, softmax_sample
from condgen.nn.vpn import Kind
from condgen.nn.vpn_network import DecoderKind, Told, VpnNetwork
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec


class Vpn(System):
    """decoder "masked" is VPN; "independent" is the paper's baseline, which draws every pixel from the past alone.

    decoder          "masked": a PixelCNN with its blind spot; "two-stack": without one; "independent"
    output           "softmax": a probability for each value of each colour, red before green before blue;
                     "sigmoid": the cross-entropy of grey levels, as published for Moving MNIST: no likelihood of
                     8-bit clips. It is never below the clips' own entropy (86.3 nats a frame on the published file)
    values           of "softmax": 256, or 2: clips are thresholded at half grey, and their likelihood is exact
    unit             of every block: "multiplicative", or "relu"
    width            c: 128 (blocks are 2c, c, c, 2c wide). "masked" and "two-stack" need a multiple of 3 for RGB
    encoder_blocks, decoder_blocks   8 and 12 as published
    dilated          the encoder's blocks are dilated by 1, 2, 4, 8, 1, 2, ...
    hidden           channels of the convolutional LSTM: 256
    future_actions   the last T entries of the condition's frames hold only the actions of the T frames to come (their
                     pixels are not read); with a FramesSpec of past + T frames
    checkpoint_activations   computes the blocks again in the backward pass: a third slower, a fraction of the memory

    Past frames enter the encoder, with their actions (states too) replicated over space: actions[n] goes with frame n
    and acts on frame n + 1. Labels and text enter the encoder and every gate of the decoder as vectors. A frame that
    is not given leaves the LSTM as it was. Without past frames the first frame is drawn from the vectors alone.

    Clips (B, T, C, H, W). sample: (B, T, C, H, W) in [-1, 1], on the grid of the values.
    """

    consumes: ClassVar[tuple[str, ...]] = ("temporal", "vector")
    reads: ClassVar[tuple[str, ...] | None] = ("frames", "label", "text")
    makes: ClassVar[Literal["pictures", "clips"]] = "clips"
    rolls: ClassVar[bool] = True

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        decoder: DecoderKind = "masked",
        output: Literal["softmax", "sigmoid"] = "softmax",
        values: Literal[2, 256] = 256,
        unit: Kind = "multiplicative",
        width: Annotated[int, Range(1)] = 128,
        encoder_blocks: Annotated[int, Range(1)] = 8,
        decoder_blocks: Annotated[int, Range(1)] = 12,
        dilated: bool = True,
        hidden: Annotated[int, Range(1)] = 256,
        future_actions: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(condition=condition, target=target)
        if output == "sigmoid" and values == 2:
            raise ConfigError("system.output=sigmoid is for grey levels; for values=2 use output=softmax: the same law")
        _check_specs(condition, target, future_actions)
        self.grey, self.values, self.draws = output == "sigmoid", values, target.channels
        self.network = Conditioned(
            condition, target, decoder=decoder, outputs=target.channels * (1 if self.grey else values), kind=unit,
            width=width, encoder_blocks=encoder_blocks, decoder_blocks=decoder_blocks, dilated=dilated, hidden=hidden,
            future_actions=future_actions, save_memory=checkpoint_activations,
        )  # fmt: skip

    @property
    def likelihood(self) -> str:
        """ "none" where the targets are grey levels of a sigmoid."""
        return "none (cross-entropy of grey levels)" if self.grey else "exact"

    @property
    def dequantisation(self) -> str:
        return "none" if self.values == 256 else "binary"

    @property
    def binarise(self) -> Literal["none", "threshold"]:
        """How its clips are made black and white where values = 2."""
        return "none" if self.values == 256 else "threshold"

    def phases(self) -> Sequence[Phase]:
        return [Phase("nll", self.nll_loss, trains=("network",))]

    def nll_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """Nats per colour of a pixel, true frames and pixels before it given; `nats_per_frame` is their sum over a
        frame. With a softmax also in bits; with a sigmoid `above_floor`: nats a frame above the clip's own entropy."""
        clip = self._on_grid(batch.target)
        nats = self._nats(self._law(clip, batch.condition), clip).mean()
        losses = {"loss": nats / clip[0, 0].numel(), "nats_per_frame": nats.detach()}
        if self.grey:
            return {**losses, "above_floor": nats.detach() - grey_entropy(clip).sum((2, 3, 4)).mean()}
        return {**losses, "bits_per_dim": losses["loss"].detach() / math.log(2)}

    def log_prob(self, target: Tensor, condition: Condition, *, random: Random) -> Tensor:
        """log p(clip | condition) (B,) in nats, exact; nothing is drawn from `random`.

        With values=2 the target is thresholded, and it is the probability of that binary clip. Raises ConfigError for
        output=sigmoid, whose score is `frame_nats`.
        """
        if self.grey:
            raise ConfigError(
                "system.output=sigmoid on grey levels is a cross-entropy, which is no likelihood; its score is nats a "
                "frame. Train with output=softmax for a likelihood"
            )
        return -self.frame_nats(target, condition).sum(1)

    def frame_nats(self, target: Tensor, condition: Condition) -> Tensor:
        """float64 (B, T) in nats: what each frame costs when all before it is known (teacher forced), summed over it.

        With output=sigmoid the cross-entropy of grey levels; its least value is `frame_floor`.
        """
        clip = self._on_grid(target)
        # in float64: a sum over thousands of pixels, beside a bound that it may come close to
        return self._nats(self._law(clip, condition).double(), clip.double())

    def frame_floor(self, target: Tensor) -> Tensor | None:
        """float64 (B, T): the entropy of the grey levels themselves, which no model is below; None for a likelihood."""
        return grey_entropy(self._on_grid(target).double()).sum((2, 3, 4)) if self.grey else None

    def sample(
        self,
        condition: Condition,
        *,
        random: Random,
        cached: bool = True,
        temperature: float | None = None,
        exact: bool = True,
        length: int = 0,
    ) -> Tensor:
        """cached       each activation is computed once; False runs the decoder for every draw, for comparison
        temperature  below 1 draws likelier pixels, above 1 less likely ones; 0 = no noise: the likeliest value, or of
                     a sigmoid its mean as a grey level. A sigmoid above 0 draws black or white. None = 1 of a softmax
                     and 0 of a sigmoid, which has learned from grey levels
        exact        computes in float64, so that neither `cached` nor the batch size changes a pixel; see `pixelcnn`
        length       frames; 0 = as many as it was trained for. More are rolled forward, the first ones unchanged: the
                     state of the LSTM goes on, so that nothing older is cut off
        """
        heat = (0.0 if self.grey else 1.0) if temperature is None else temperature
        if not heat >= 0 or length < 0:
            raise ShapeError(f"temperature={temperature} and length={length} must not be negative")
        count = length or self.target_spec.frames
        if self.network.future_actions and count > self.target_spec.frames:
            raise ShapeError(f"length={length}: there are actions for {self.target_spec.frames} frames only")
        like = next(self.network.decoder.parameters())
        kind = torch.float64 if exact else like.dtype
        made: list[Tensor] = []
        with torch.inference_mode(), torch.autocast(like.device.type, enabled=False):
            network = self.network if like.dtype == kind else copy.deepcopy(self.network).to(kind)
            told = network.told(condition.to(like.device, kind), random.rows, kind)
            state = network.start(told)
            for t in range(count):
                if t:
                    state = network.follow(made[-1], told, t - 1, state)
                shape = (*self.target_spec.shape[2:], self.draws)
                uniform = random.rand(*shape).to(like.device, kind)
                made.append(self._frame(network, uniform, network.context(told, state), told.vector, heat, cached))
        return quantise(torch.stack(made, 1).float(), self.values)

    @property
    def sample_fields(self) -> dict[str, str]:
        return {"temperature": "0"} if self.grey else {}

    def _law(self, clip: Tensor, condition: Condition) -> Tensor:
        parameters: Tensor = self.network(clip, self.network.told(condition, len(clip), clip.dtype))
        return parameters

    def _frame(
        self, network: Conditioned, uniform: Tensor, context: Tensor, vector: Tensor | None, heat: float, cached: bool
    ) -> Tensor:
        """One frame (B, C, H, W) from uniforms (B, H, W, C)."""
        batch, height, width, _ = uniform.shape
        frame = uniform.new_zeros(batch, self.draws, height, width)
        if network.independent:
            parameters = network.decoder(frame, vector, [context]).unflatten(1, (-1, self.draws))
            flat = parameters.permute(0, 2, 3, 4, 1).flatten(0, 3)
            value = self._value(flat, uniform.permute(0, 3, 1, 2).reshape(-1, 1), heat)
            return value.view_as(frame)
        steps: Steps
        if cached:
            steps = network.decoder.steps(batch, (height, width), vector, [context])  # type: ignore[operator]
        else:
            steps = PlainSteps(network.decoder, frame, self.draws, vector, [context])
        for row in range(height):
            steps.start_row(row)
            noise = uniform[:, row].permute(1, 2, 0)[..., None].contiguous()  # (W, C, B, 1)
            for column in range(width):
                for draw in range(self.draws):
                    value = self._value(steps.parameters(column, draw), noise[column, draw], heat)
                    frame[:, draw : draw + 1, row, column] = value
                    steps.put(column, draw, value)
        return frame

    def _value(self, parameters: Tensor, uniform: Tensor, heat: float) -> Tensor:
        """Parameters (B, P) of one colour and uniforms (B, 1) -> values (B, 1) on the grid in [-1, 1]."""
        if self.grey and heat > 0:
            return (uniform < torch.sigmoid(parameters / heat)).to(parameters.dtype).mul_(2).sub_(1)
        if self.grey:
            return torch.sigmoid(parameters).mul_(255).round_().mul_(2 / 255).sub_(1)
        if heat > 0:
            return softmax_sample(parameters / heat, uniform)
        return parameters.argmax(1, keepdim=True).to(parameters.dtype).mul_(2 / (self.values - 1)).sub_(1)

    def _nats(self, parameters: Tensor, clip: Tensor) -> Tensor:
        """Parameters (B, T, P, H, W) and a clip on the grid -> (B, T), summed over pixels and colours."""
        with torch.autocast(clip.device.type, enabled=False):
            if parameters.dtype != torch.float64:
                parameters, clip = parameters.float(), clip.float()
            if self.grey:
                return -bernoulli_log_prob(parameters, clip).sum((2, 3, 4))
            # frame after frame, as the network computes them: nothing is copied. (T B, values, C, H, W)
            logits = parameters.transpose(0, 1).flatten(0, 1).unflatten(1, (self.values, self.draws))
            index = ((clip.transpose(0, 1).flatten(0, 1) + 1) * ((self.values - 1) / 2)).round().long()
            nats = F.cross_entropy(logits, index, reduction="none").sum((1, 2, 3))
            return nats.unflatten(0, (clip.shape[1], -1)).t()

    def _on_grid(self, target: Tensor) -> Tensor:
        """(B, T, C, H, W), T free, on the grid of 8 bits, or -1 and 1 where values = 2."""
        spec = self.target_spec
        if target.dim() != 5 or tuple(target.shape[2:]) != spec.shape[1:]:
            raise ShapeError(
                f"clips have shape {tuple(target.shape[1:])}; this system was built for {spec.shape} (T is free)"
            )
        if self.network.future_actions and target.shape[1] > spec.frames:
            raise ShapeError(f"a clip of {target.shape[1]} frames: there are actions for {spec.frames} only")
        pixels = target.to(next(self.network.decoder.parameters()).dtype)
        return quantise(pixels) if self.values == 256 else torch.where(pixels >= 0, 1.0, -1.0).to(pixels.dtype)


class Conditioned(VpnNetwork):
    """A network with its own encoding of the condition."""

    def __init__(self, condition: ConditionSpec, target: TargetSpec, *, future_actions: bool, **sizes: Any) -> None:
        stack = ConditionStack(condition, assign_forms(condition, Vpn.consumes))
        actions = condition.frames.actions if condition.frames is not None else 0
        shape = (target.channels, target.height, target.width)
        super().__init__(shape, actions=actions, vector=stack.widths["vector"], **sizes)
        self.stack, self.length, self.future_actions = stack, target.frames, future_actions

    def told(self, condition: Condition, rows: int, kind: torch.dtype) -> Told:
        """`rows` is B where the condition is empty."""
        frames = condition.frames
        device = next(self.parameters()).device
        actions = torch.zeros(rows, 0, self.actions, dtype=kind, device=device)
        if self.future_actions and frames is not None:
            assert frames.actions is not None
            past = frames.pixels.shape[1] - self.length
            present = condition.is_present("frames")[:, None, None]
            actions = torch.where(present, frames.actions[:, past:], 0).to(kind)
            frames = replace(
                frames, pixels=frames.pixels[:, :past], mask=frames.mask[:, :past], actions=frames.actions[:, :past]
            )
            condition = replace(condition, frames=frames)
        forms = self.stack(condition)
        vector = None if forms.vector is None else forms.vector.to(kind)
        if forms.temporal is None:
            none = torch.zeros(rows, 0, self.frame[0] + self.actions, *self.frame[1:], dtype=kind, device=device)
            return Told(vector, none, torch.ones(rows, 0, dtype=torch.bool, device=device), actions)
        assert forms.temporal_mask is not None
        # a row without any frame takes every step on its null, which may be learned
        given = forms.temporal_mask | ~forms.temporal_mask.any(1, keepdim=True)
        return Told(vector, forms.temporal.to(kind), given, actions)


def _check_specs(condition: ConditionSpec, target: TargetSpec, future_actions: bool) -> None:
    past, frame = condition.frames, target.shape[-3:]
    if not target.frames:
        raise ShapeError("vpn makes clips; the data give pictures. Use system=pixelcnn")
    if past is None and target.frames == 1:
        raise ShapeError("one frame without past frames is a picture; use system=pixelcnn, or set data.past")
    if past is not None and (past.channels, past.height, past.width) != frame:
        raise ShapeError(
            f"past frames are {past.channels} x {past.height} x {past.width} and the target's "
            f"{' x '.join(map(str, frame))}; vpn keeps one resolution"
        )
    if future_actions and (past is None or not past.actions or past.frames <= target.frames):
        raise ConfigError(
            f"system.future_actions=true needs actions of the past and of the {target.frames} target frames; "
            f"the data give {'none' if past is None or not past.actions else past.frames}"
        )
