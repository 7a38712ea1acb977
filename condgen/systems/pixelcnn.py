"""Autoregressive pictures with exact likelihood: PixelCNN, Gated PixelCNN, PixelCNN++ and PixelRNN, pixel by pixel.

van den Oord et al. 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759, and "Conditional Image Generation with
PixelCNN Decoders", arXiv:1606.05328; Salimans et al. 2017, "PixelCNN++", arXiv:1701.05517.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses.logistic_mixture import mixture_log_prob, mixture_noise, mixture_sample, parameter_count, quantise
from condgen.nn.gated_pixelcnn import GatedPixelCnn
from condgen.nn.incremental import PlainSteps, Steps, softmax_sample
from condgen.nn.pixelcnn import PixelCnn2016
from condgen.nn.pixelcnnpp import PixelCnnPp
from condgen.nn.pixelrnn import PixelRnn
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

Net = PixelCnn2016 | GatedPixelCnn | PixelCnnPp | PixelRnn
RECURRENT = ("row_lstm", "diagonal_bilstm")
PLACED = ("boxes", "keypoints", "image", "frames")  # enter as maps, the others as vectors


class PixelCnn(System):
    """architecture "pixelcnn++" with likelihood "mixture" is PixelCNN++; the others with "softmax" are the networks of
    2016. Every architecture takes either likelihood.

    architecture     "gated" and "pixelcnn++" see every earlier pixel, "pixelcnn" has the blind spot of 2016;
                     PixelRNN is "row_lstm", which sees a triangle, or "diagonal_bilstm", which sees all but the
                     last pixel of the row above (far from it). Both are slower than the others for lack of parallel
                     work: H steps a layer, and H + W - 1
    likelihood       "softmax": a probability for each value of each colour, red before green before blue;
                     "mixture": logistics over whole pixels, discretised exactly (1 or 3 colours)
    width            channels: 160 (PixelCNN++ as released), 128 (h of PixelCNN and PixelRNN; their stream is 2h wide).
                     With a softmax over 3 colours all but "pixelcnn++" need multiples of 3
    blocks           residual blocks: 5 a scale (PixelCNN++), 15 (PixelCNN), 20 (Gated PixelCNN), 12 (PixelRNN)
    scales           resolutions of PixelCNN++, each half the one before: 3 as released
    kernel           of "pixelcnn" and "row_lstm" (3 as published) and of "gated"'s stacks; 0 = 3, 3 and 5
    skip             of "row_lstm" and "diagonal_bilstm": every layer also reaches the output, by a 1x1 convolution of
                     its own; published with 3.06 bits against 3.07 without (Row LSTM of 12 layers, CIFAR-10)
    head_width       channels between the last block and a softmax; 0 = width. Published: 1024 for PixelCNN and PixelRNN
    mixtures         logistics a pixel: 10 as released
    values           256, or 2: pictures are thresholded at half grey, and the likelihood is that of the binary picture
    dropout          of PixelCNN++'s blocks, from torch's generator, which the engine seeds for each rank and step
    data_init        PixelCNN++ sets its scales and biases from the first batch it trains on, over all processes
                     (with accumulation: from the first part of it). A buffer says that it has been done
    checkpoint_activations   computes the blocks again in the backward pass: about a third slower, a fraction of the
                     memory

    Labels and text enter as vectors, boxes, keypoints and pictures as maps, in every block. Pictures (B, C, H, W).
    sample: (B, C, H, W) in [-1, 1], on the grid of the values.
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector", "map")

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        architecture: Literal["pixelcnn", "gated", "pixelcnn++", "row_lstm", "diagonal_bilstm"] = "pixelcnn++",
        likelihood: Literal["softmax", "mixture"] = "mixture",
        width: Annotated[int, Range(1)] = 160,
        blocks: Annotated[int, Range(1)] = 5,
        scales: Annotated[int, Range(1, 6)] = 3,
        kernel: Annotated[int, Range(0, 15)] = 0,
        skip: bool = False,
        head_width: Annotated[int, Range(0)] = 0,
        mixtures: Annotated[int, Range(1)] = 10,
        values: Literal[2, 256] = 256,
        dropout: Annotated[float, Range(0, 0.99)] = 0.5,
        data_init: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(condition=condition, target=target)
        if kernel and kernel % 2 == 0:
            raise ConfigError(
                f"system.kernel={kernel}: a kernel has a middle; give an odd number, or 0 for the published"
            )
        if skip and architecture not in RECURRENT:
            raise ConfigError(
                f"system.skip=true is for {' and '.join(RECURRENT)}; the architecture is {architecture}. Leave skip out"
            )
        self.mixture, self.mixtures, self.values = likelihood == "mixture", mixtures, values
        self.data_init, self.scales = data_init and architecture == "pixelcnn++", 1
        forms = assign_forms(condition.without(PLACED), ("vector", "map"))
        forms |= assign_forms(condition.only(PLACED), ("map", "vector"))
        stack = ConditionStack(condition, forms)
        colours = target.channels
        outputs = parameter_count(mixtures, colours) if self.mixture else values * colours
        self.draws = 1 if self.mixture else colours  # draws a pixel
        sizes: dict[str, Any] = {
            "width": width, "blocks": blocks, "head_width": head_width or width, "colours": self.draws,
            "vector": stack.widths["vector"], "maps": stack.widths["map"], "save_memory": checkpoint_activations,
        }  # fmt: skip
        net: Net
        if architecture == "pixelcnn":
            net = PixelCnn2016(colours, outputs, kernel=kernel or 3, **sizes)
        elif architecture == "gated":
            net = GatedPixelCnn(colours, outputs, kernel=kernel or 5, **sizes)
        elif architecture in RECURRENT:
            diagonal = architecture == "diagonal_bilstm"
            net = PixelRnn(colours, outputs, diagonal=diagonal, kernel=kernel or 3, skip=skip, **sizes)
        else:
            self.scales = scales
            net = PixelCnnPp(colours, outputs, scales=scales, dropout=dropout, **sizes)
        _check_size(target, 1 << (self.scales - 1))
        self.network = Conditioned(stack, net)

    @property
    def likelihood(self) -> str:
        return "exact"

    @property
    def dequantisation(self) -> str:
        return "none" if self.values == 256 else "binary"

    def phases(self) -> Sequence[Phase]:
        return [Phase("nll", self.nll_loss, trains=("network",))]

    def nll_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log p(picture | condition) per colour of a pixel, in nats; also in bits."""
        pixels = self._on_grid(batch.target)
        if self.training and self.data_init:
            self._initialise(pixels, batch.condition)
        nats = -self._log_prob(pixels, batch.condition).mean() / pixels[0].numel()
        return {"loss": nats, "bits_per_dim": nats.detach() / math.log(2)}

    def log_prob(self, target: Tensor, condition: Condition, *, random: Random) -> Tensor:
        """log p(target | condition) (B,) in nats, exact; nothing is drawn from `random`.

        With values=2 the target is thresholded, and it is the probability of that binary picture.
        """
        return self._log_prob(self._on_grid(target), condition)

    def sample(
        self, condition: Condition, *, random: Random, cached: bool = True, temperature: float = 1.0, exact: bool = True
    ) -> Tensor:
        """cached       each activation is computed once; False runs the whole network for every draw, for comparison
        temperature  below 1 draws likelier pixels, above 1 less likely ones
        exact        computes in float64, so that neither `cached` nor the batch size changes a pixel. In float32
                     a parameter differs by about 1e-6 between two ways to compute it; where that moves a pixel over
                     the edge between two values, the rest of the picture is another (a few in a hundred at 32 px)
        """
        if not temperature > 0:
            raise ShapeError(f"temperature={temperature} must be above 0; 1 samples from the model")
        spec = self.target_spec
        size = (spec.height, spec.width)
        uniform = random.rand(*size, self.mixtures + spec.channels if self.mixture else self.draws)
        like = next(self.network.net.parameters())
        kind = torch.float64 if exact else like.dtype
        uniform = uniform.to(like.device, kind)
        canvas = uniform.new_zeros(len(uniform), *spec.shape)
        with torch.inference_mode(), torch.autocast(like.device.type, enabled=False):
            network = self.network if like.dtype == kind else copy.deepcopy(self.network).to(kind)
            vector, maps = network.told(condition.to(like.device, kind), self._sizes(), kind)
            steps: Steps
            if cached:
                steps = network.net.steps(len(canvas), size, vector, maps)
            else:
                steps = PlainSteps(network.net, canvas, self.draws, vector, maps)
            self._draw(steps, uniform, canvas, temperature)
        return quantise(canvas.float(), self.values)

    def _draw(self, steps: Steps, uniform: Tensor, canvas: Tensor, temperature: float) -> None:
        """Fills `canvas` (B, C, H, W) in raster order."""
        _, _, height, width = canvas.shape
        noise = mixture_noise(uniform, self.mixtures) if self.mixture else (uniform, uniform)
        for row in range(height):
            steps.start_row(row)
            first, second = (part[:, row].transpose(0, 1).contiguous() for part in noise)
            for column in range(width):
                for draw in range(self.draws):
                    parameters = steps.parameters(column, draw)
                    if self.mixture:
                        value = mixture_sample(
                            parameters, first[column], second[column], values=self.values, temperature=temperature
                        )
                        canvas[:, :, row, column] = value
                    else:
                        value = softmax_sample(parameters / temperature, first[column][:, draw : draw + 1])
                        canvas[:, draw : draw + 1, row, column] = value
                    steps.put(column, draw, value)

    def _log_prob(self, pixels: Tensor, condition: Condition) -> Tensor:
        parameters = self.network(pixels, condition, self._sizes())
        with torch.autocast(pixels.device.type, enabled=False):
            parameters = parameters.float() if parameters.dtype != torch.float64 else parameters
            if self.mixture:
                return mixture_log_prob(parameters, pixels, values=self.values).sum((1, 2))
            logits = parameters.unflatten(1, (self.values, self.draws))  # (B, values, C, H, W)
            index = ((pixels + 1) * ((self.values - 1) / 2)).round().long()
            return -F.cross_entropy(logits, index, reduction="none").sum((1, 2, 3))

    def _on_grid(self, target: Tensor) -> Tensor:
        """(B, C, H, W) on the grid of 8 bits, or -1 and 1 where values = 2."""
        if tuple(target.shape[1:]) != self.target_spec.shape:
            raise ShapeError(
                f"pictures have shape {tuple(target.shape[1:])}; this system was built for {self.target_spec.shape}"
            )
        pixels = target.to(next(self.network.net.parameters()).dtype)
        return quantise(pixels) if self.values == 256 else torch.where(pixels >= 0, 1.0, -1.0).to(pixels.dtype)

    def _sizes(self) -> list[tuple[int, int]]:
        return [(self.target_spec.height >> s, self.target_spec.width >> s) for s in range(self.scales)]

    @torch.no_grad()
    def _initialise(self, pixels: Tensor, condition: Condition) -> None:
        net = self.network.net
        assert isinstance(net, PixelCnnPp)
        if not bool(net.calibrated):
            with torch.autocast(pixels.device.type, enabled=False):
                net.calibrate(pixels, *self.network.told(condition, self._sizes(), pixels.dtype))
        self.data_init = False  # the buffer, which a checkpoint may set to done, need not be read again


class Conditioned(nn.Module):
    """A network with its own encoding of the condition."""

    def __init__(self, stack: ConditionStack, net: Net) -> None:
        super().__init__()
        self.stack, self.net = stack, net

    def told(
        self, condition: Condition, sizes: Sequence[tuple[int, int]], kind: torch.dtype
    ) -> tuple[Tensor | None, list[Tensor]]:
        """vector (B, V) or None, and one map (B, M, h, w) for each of `sizes`, or none at all."""
        forms = [self.stack(condition, size) for size in sizes]
        vector = forms[0].vector
        maps = [form.map.to(kind) for form in forms if form.map is not None]
        return None if vector is None else vector.to(kind), maps

    def forward(self, pixels: Tensor, condition: Condition, sizes: Sequence[tuple[int, int]]) -> Tensor:
        vector, maps = self.told(condition, sizes, pixels.dtype)
        return self.net(pixels, vector, maps)


def _check_size(target: TargetSpec, multiple: int) -> None:
    if target.frames:
        raise ShapeError(f"pixelcnn makes pictures; the data give clips of {target.frames} frames")
    if target.height % multiple or target.width % multiple:
        raise ShapeError(
            f"PixelCNN++ on these scales needs sides that are multiples of {multiple}; the data give "
            f"{target.height} x {target.width}. Change data.size, or system.scales"
        )
