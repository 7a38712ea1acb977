"""What every model family implements: `Phase` for what is optimised and in which order, `Trainable`, and `System`.

The engine trains any `Trainable`. A `System` is one that also makes pictures, which is all that sampling,
translating and evaluating ask for; an encoder such as `joint_embedding` is a `Trainable` only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from condgen.rng import Random, StepRandom
from condgen.types import Batch, Condition, ConditionSpec, Keypoints, TargetSpec

Losses = dict[str, Tensor]
LossMethod = Callable[[Batch, StepRandom], Losses | None]


@dataclass(frozen=True)
class Phase:
    """One optimiser and the loss it minimises.

    name      "discriminator", "generator", "nll", ...; also the key of its options: `optim.<name>.lr`
    loss      bound method (batch, random) -> {"loss": scalar, other scalars are only logged}, or None to skip
    trains    names of the submodules whose parameters it updates; phases train disjoint parameters
    every     runs at steps where step % every == 0
    repeats   updates per step, each after the first on a fresh batch (WGAN critics)
    start, stop   first step and first step no longer (None = never stops)
    """

    name: str
    loss: LossMethod
    trains: tuple[str, ...]
    every: int = 1
    repeats: int = 1
    start: int = 0
    stop: int | None = None

    def due(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop) and (step - self.start) % self.every == 0


class Trainable(nn.Module, ABC):
    """Networks and the losses that train them: what the engine, EMA and export know.

    The constructor is keyword-only, flat and typed: its signature is the schema of `system.*` in the
    configuration. `condition` and `target` are given by the framework. State that changes lives in buffers.
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)
    """Forms it can take: of "vector", "map", "sequence", "temporal"."""

    reads: ClassVar[tuple[str, ...] | None] = None
    """Condition fields it uses; None = every field that has a form in `consumes`. Data with others are refused."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Condition fields it cannot work without."""

    needs_one_of: ClassVar[tuple[str, ...]] = ()
    """Condition fields of which it needs at least one, such as ("boxes", "keypoints"); () = no such need."""

    generates: ClassVar[tuple[str, ...]] = ()
    """Submodules that are used after training: what EMA averages and what is exported. () = all of them."""

    makes: ClassVar[Literal["pictures", "clips"]] = "pictures"
    """What it is built for: targets (C, H, W), or (T, C, H, W). It refuses the other one itself, with its reason."""

    rolls: ClassVar[bool] = False
    """Whether `sample` takes `length`, frames of a clip longer (or shorter) than trained, the first ones unchanged."""

    def __init__(self, *, condition: ConditionSpec, target: TargetSpec) -> None:
        super().__init__()
        self.condition_spec = condition
        self.target_spec = target

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """What is optimised, in order; called once."""

    def shared(self, batch: Batch, random: StepRandom) -> Any:
        """Work that several phases of one step share (a generated batch), computed once; see Batch.shared."""
        return None


class System(Trainable):
    """A generator with its critics, losses and sampler."""

    @abstractmethod
    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        """One output per row of `condition` (and of `random`), target-shaped, float in [-1, 1].

        For an unconditional system the condition is empty and `random.rows` says how many to draw.
        Runs under no_grad in eval mode. Subclasses may add keyword options with defaults; None as a default stands for
        what the system itself was set to, which `sample_fields` then tells.
        """

    @property
    def sample_fields(self) -> dict[str, str]:
        """What the system's own options make of its samples, such as {"sample_mode": "mean"}: fields of the signature
        of every score of samples. What all systems do that have no such option, a draw at temperature 1, is left out.
        """
        return {}


@runtime_checkable
class HasLikelihood(Protocol):
    """log p of 8-bit pictures, exact or bounded, in nats.

    likelihood       "exact", or what the expectation of `log_prob` is: "lower bound (ELBO)", ...
    dequantisation   how a density over real numbers became one of 256 values: "none" (discrete from the start),
                     "uniform", "interval" (the density's mass between two half values), ...
    """

    @property
    def likelihood(self) -> str: ...

    @property
    def dequantisation(self) -> str: ...

    def log_prob(self, target: Tensor, condition: Condition, *, random: Random) -> Tensor:
        """log p(target | condition) (B,) in nats, of pixels k / 127.5 - 1 with integer k, as probability of one of
        256 ** (C H W) pictures.

        A system whose likelihood is a bound returns the logarithm of one importance weight, drawn from `random`:
        its mean is the bound, and the log of the mean of exp over K draws is the bound of Burda et al. 2016
        (arXiv:1509.00519), which rises with K to log p. An exact system draws nothing.
        """
        ...


@runtime_checkable
class HasDecoder(Protocol):
    """Noise in one tensor, and nothing else random: what arithmetic and walks need.

    noise   "normal": N(0, I), walked on the sphere; "uniform": U(-1, 1), walked in straight lines
    """

    @property
    def noise(self) -> str: ...

    def draw(self, random: Random) -> Tensor:
        """The noise (rows, Z) with which `sample(condition, random=random)` is `decode(noise, condition)`."""
        ...

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """(B, Z) and its condition -> pictures; differentiable in `latent`."""
        ...


@runtime_checkable
class HasLatent(Protocol):
    """An encoder from pixels to the noise that would have made them (style transfer, interpolation)."""

    def encode(self, target: Tensor, condition: Condition) -> Tensor: ...

    def decode(self, latent: Tensor, condition: Condition) -> Tensor: ...


@runtime_checkable
class HasStreams(Protocol):
    """Samples that are put together from parts which mean something alone."""

    def streams(self, condition: Condition, *, random: Random) -> dict[str, Tensor]:
        """What `sample` puts together, by name: "video", which it returns, and its parts, each (B, T, C or 1, H, W)
        in [-1, 1]; of a clip "foreground", "mask" (-1 = background, 1 = foreground) and "background"."""
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """A discriminator that sees more than real and fake: its features serve other tasks."""

    def features(self, clips: Tensor) -> Tensor:
        """Targets (B, ...) -> features (B, F, ...) before the last layer."""
        ...


@runtime_checkable
class HasCompletion(Protocol):
    """Completes the keypoints of a condition; need not make pictures."""

    def complete(self, condition: Condition, *, random: Random, threshold: float = 0.5) -> Keypoints:
        """Given points as they are, and drawn ones whose visibility exceeds the threshold."""
        ...


@runtime_checkable
class HasRefine(Protocol):
    """Test-time improvement of a sample under its condition (PPGN and relatives)."""

    def refine(self, sample: Tensor, condition: Condition, *, random: Random) -> Tensor: ...
