"""Systems with a likelihood against a public implementation of each: seconds per training step and per evaluation.

    python benchmarks/likelihood.py --system NAME --public DIR [--batch 16] [--rounds 5] [--threads N] [--json FILE]

DIR is a checkout of the public implementation named by the system's section below; without it only condgen is timed.
Both train the same network size on the same random 8-bit pictures of 32 px. Sides take turns in one process, and the
ratio is the median of the ratios of each round, so that a change of the machine's speed hits all alike. `fp32` differs
from the public step by the code alone (and by fused Adam); `bf16` is train.precision=bf16: autocast, channels last.
Where weights can be copied, the largest difference of the log-likelihood under equal weights is printed as well.
Parameters and FLOPs of both are printed (of convolutions and matrix products, by torch's counter). cqf, vae and their
kin with IAF run against pythae's VAE around the same layers (it takes any); `cqf_cifar` and `vae_cifar` against
its own networks, other layers at the nearest width that asks for no fewer FLOPs: there GFLOP/s say more than images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import public_pythae
import torch
from public_pixelcnnpp import copy_weights, load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from condgen.engine.optim import OptimOptions, make_optimizer
from condgen.engine.world import World
from condgen.rng import StepRandom
from condgen.systems.base import HasLikelihood, System
from condgen.systems.cqf import Cqf
from condgen.systems.pixelcnn import PixelCnn
from condgen.systems.realnvp import RealNvp
from condgen.systems.vae import Vae
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

SIDE = 32
TARGET = TargetSpec(3, SIDE, SIDE)


@dataclass(frozen=True)
class Side:
    """One implementation: `train` makes one update, `evaluate` scores one batch without gradients."""

    train: Callable[[], object]
    evaluate: Callable[[], object]
    network: nn.Module


@dataclass(frozen=True)
class Section:
    """One system: how it is built, and its public counterpart from a checkout with the difference under equal weights.

    make, public and difference take True for --tiny, which only shows that everything runs

    difference   None where the networks are not the same
    clip   largest norm of the gradient, on both sides; None = not clipped
    """

    public_name: str
    make: Callable[[bool], System]
    public: Callable[[Path, Tensor, bool], Side]
    difference: Callable[[Path, Tensor, bool], float] | None = None
    clip: float | None = None


def pictures(rows: int) -> Tensor:
    """uint8 (rows, 3, 32, 32)."""
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, *TARGET.shape), generator=draws, dtype=torch.uint8)


def ours(section: Section, pixels: Tensor, precision: str, small: bool) -> Side:
    """What the engine does in one step of one phase, without its loop."""
    torch.manual_seed(0)
    world = World(precision=precision)
    system = section.make(small)
    world.place(system)
    phase = system.phases()[0]
    adam = make_optimizer(system.parameters(), OptimOptions(lr=1e-3, betas=(0.9, 0.999)))
    batch = world.place_batch(Batch(pixels))
    assert isinstance(system, HasLikelihood)

    def train() -> None:
        system.train()
        adam.zero_grad()
        with world.autocast():
            losses = phase.loss(batch, StepRandom(0, rows=len(batch)))
        assert losses is not None
        losses["loss"].backward()
        if section.clip is not None:
            nn.utils.clip_grad_norm_(system.parameters(), section.clip)
        adam.step()

    def evaluate() -> Tensor:
        system.eval()
        with torch.no_grad(), world.autocast():
            return system.log_prob(batch.target, Condition(), random=StepRandom(0, rows=len(batch)))

    return Side(train, evaluate, system)


# Real NVP against chrischute/real-nvp: 2 scales, 64 maps, 8 blocks, batch norm in the coupling networks, none between
# couplings, loss in nats. Its squeeze calls `view` on strided tensors, which torch no longer allows: `_own_view`.


def real_nvp(small: bool) -> RealNvp:
    size = {"width": 8, "blocks": 1} if small else {"width": 64, "blocks": 8}
    return RealNvp(condition=ConditionSpec(), target=TARGET, scales=2, norm="none", net_norm="batch", **size)


def public_real_nvp(folder: Path, pixels: Tensor, small: bool) -> Side:
    network, loss = _chrischute(folder, small)
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    unit = pixels.float() / 255

    def train() -> None:
        network.train()
        adam.zero_grad()
        with _own_view():
            loss(*network(unit, reverse=False)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 100.0)
        adam.step()

    def evaluate() -> Tensor:
        network.eval()
        with torch.no_grad(), _own_view():
            return loss(*network(unit, reverse=False))

    return Side(train, evaluate, network)


def real_nvp_difference(folder: Path, pixels: Tensor, small: bool) -> float:
    """Largest |z - z'| + |log-det - log-det'| / dimensions under copied weights and equal logits, in float64."""
    network, _ = _chrischute(folder, small)
    system = real_nvp(small)
    theirs, flow = network.double().eval(), system.flow.flow.double().eval()
    draws = torch.Generator().manual_seed(2)
    for name, buffer in theirs.named_buffers():  # statistics of an untrained network would test nothing
        if "running" in name:
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draws))
    for stage in range(2):
        block = theirs.flows if stage == 0 else theirs.flows.next_block
        pairs = [(flow.spatial[stage], block.in_couplings)]
        pairs += [(flow.deep[stage], block.out_couplings)] if stage == 0 else []
        for mine, others in pairs:
            for coupling, other in zip(mine, others, strict=True):
                _copy_coupling(coupling, other)
    x = torch.randn(len(pixels), *TARGET.shape, generator=draws, dtype=torch.float64)
    with torch.no_grad(), _own_view():
        z, logdet = flow(x)
        expected, their_logdet = theirs.flows(x, torch.zeros(len(x), dtype=x.dtype))
    gap = (logdet - their_logdet).abs().max() / math.prod(TARGET.shape)
    return float((z - expected).abs().max() + gap)


def _chrischute(folder: Path, small: bool) -> tuple[Any, Any]:
    sys.path.insert(0, str(folder.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import models

        torch.manual_seed(0)
        network = models.RealNVP(num_scales=2, mid_channels=8 if small else 64, num_blocks=1 if small else 8)
    return network, models.RealNVPLoss()


@contextlib.contextmanager
def _own_view() -> Any:
    """`Tensor.view` that copies where torch refuses, inside this block."""
    plain = torch.Tensor.view
    torch.Tensor.view = lambda self, *shape: plain(self.contiguous(), *shape)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.view = plain  # type: ignore[method-assign]


def _copy_coupling(mine: Any, other: Any) -> None:
    net, theirs = mine.net, other.st_net
    with torch.no_grad():
        mine.factor.copy_(other.rescale.weight_g * other.rescale.weight_v.sign())
    convolutions = [(net.stem, theirs.in_conv), (net.skips[0], theirs.in_skip), (net.last, theirs.out_conv)]
    norms = [(net.norm, theirs.in_norm), (net.last_norm, theirs.out_norm)]
    for at, (block, their_block) in enumerate(zip(net.blocks, theirs.blocks, strict=True)):
        convolutions += [(block.convs[0], their_block.in_conv), (block.convs[1], their_block.out_conv)]
        convolutions += [(net.skips[at + 1], theirs.skips[at])]
        norms += [(block.norms[0], their_block.in_norm), (block.norms[1], their_block.out_norm)]
    for norm, their_norm in norms:
        norm.load_state_dict(their_norm.state_dict())
    for layer, theirs_layer in convolutions:
        state = theirs_layer.conv.state_dict()
        names = {"weight_g": "gain", "weight_v": "weight", "bias": "bias"}
        layer.load_state_dict({names[name]: value for name, value in state.items()})


# PixelCNN++ as released against pclucas14/pixel-cnn-pp: 160 channels, 5 blocks a scale, 10 logistics. Both drop with
# probability 0.5, theirs whole maps, condgen's units. condgen's likelihood sums to one, theirs replaces small masses.


def pixelcnnpp(small: bool) -> PixelCnn:
    size = {"width": 8, "blocks": 1} if small else {"width": 160, "blocks": 5}
    return PixelCnn(condition=ConditionSpec(), target=TARGET, data_init=False, **size)


def public_side_pixelcnnpp(folder: Path, pixels: Tensor, small: bool) -> Side:
    module, network = _pclucas14(folder, small)
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    scaled = pixels.float() / 127.5 - 1

    def train() -> None:
        network.train()
        loss = module.discretized_mix_logistic_loss(scaled, network(scaled))
        adam.zero_grad()
        loss.backward()
        adam.step()

    def evaluate() -> Tensor:
        network.eval()
        with torch.no_grad():
            return module.discretized_mix_logistic_loss(scaled, network(scaled))

    return Side(train, evaluate, network)


def pixelcnnpp_difference(folder: Path, pixels: Tensor, small: bool) -> float:
    """Difference of the nats per dimension under copied weights, in float64."""
    module, network = _pclucas14(folder, small)
    system = pixelcnnpp(small).double().eval()
    copy_weights(network.double().eval(), system.network.net)  # type: ignore[arg-type]
    scaled = pixels.double() / 127.5 - 1
    with torch.no_grad():
        nats = system.log_prob(scaled, Condition(), random=StepRandom(0, rows=len(pixels))).sum()
        expected = module.discretized_mix_logistic_loss(scaled, network(scaled))
    return float((nats + expected).abs() / pixels.numel())


def _pclucas14(folder: Path, small: bool) -> tuple[Any, Any]:
    module = load(folder)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = module.PixelCNN(nr_resnet=1 if small else 5, nr_filters=8 if small else 160, nr_logistic_mix=10)
    return module, network


# The VAE row of cqf, and vae, against pythae. condgen's bound is that of 8-bit pixels (dequantised, or by intervals of
# logistics), pythae's is up to a constant that of a normal law of variance 1.
WIDTH, CIFAR_WIDTH = 64, 160  # of the preset "paper"; as many FLOPs as pythae's networks for CIFAR-10


def variational(kind: type[Cqf] | type[Vae], iaf: bool, width: int = WIDTH) -> Callable[[bool], System]:
    def make(small: bool) -> System:
        options: dict[str, Any] = {"width": 8 if small else width, "latent_dim": public_pythae.LATENT}
        flow = {"iaf_steps": public_pythae.IAF_STEPS, "iaf_layers": public_pythae.IAF_LAYERS}
        flow["iaf_width"] = public_pythae.IAF_WIDTH
        if kind is Cqf:
            options |= {"quality": False, "flow": False, "iaf": iaf, **flow}
        else:
            options |= {"posterior": "iaf" if iaf else "gaussian", **flow}
        return kind(condition=ConditionSpec(), target=TARGET, **options)

    return make


def public_variational(kind: type[Cqf] | type[Vae] | None, iaf: bool) -> Callable[[Path, Tensor, bool], Side]:
    """pythae around the networks of `kind`, or its own where it is None."""

    def made(folder: Path, pixels: Tensor, small: bool) -> Side:
        networks: dict[str, Any] = {}
        if kind is not None:
            system: Any = variational(kind, False)(small)
            encoder, decoder = (
                (system.encoder.net, system.decoder.net)
                if kind is Cqf
                else (system.model.encoder, system.model.decoder)
            )
            networks = {"encoder": encoder, "decoder": decoder}
        network = public_pythae.load(folder, iaf=iaf, **networks)
        adam = torch.optim.Adam(network.parameters(), lr=1e-3)
        unit = pixels.float() / 255

        def train() -> None:
            network.train()
            adam.zero_grad()
            network({"data": unit}).loss.backward()
            adam.step()

        def evaluate() -> Tensor:
            network.eval()
            with torch.no_grad():
                return network({"data": unit}).loss

        return Side(train, evaluate, network)

    return made


SECTIONS: Mapping[str, Section] = {
    "realnvp": Section("chrischute/real-nvp", real_nvp, public_real_nvp, real_nvp_difference, clip=100.0),
    "pixelcnn": Section("pclucas14/pixel-cnn-pp", pixelcnnpp, public_side_pixelcnnpp, pixelcnnpp_difference),
    "cqf": Section("pythae VAE, same layers", variational(Cqf, False), public_variational(Cqf, False)),
    "cqf_iaf": Section("pythae VAE_IAF, same layers", variational(Cqf, True), public_variational(Cqf, True)),
    "cqf_cifar": Section("pythae VAE", variational(Cqf, False, CIFAR_WIDTH), public_variational(None, False)),
    "vae": Section("pythae VAE, same layers", variational(Vae, False), public_variational(Vae, False)),
    "vae_iaf": Section("pythae VAE_IAF, same layers", variational(Vae, True), public_variational(Vae, True)),
    "vae_cifar": Section("pythae VAE", variational(Vae, False, CIFAR_WIDTH), public_variational(None, False)),
}


def measure(sides: Mapping[str, Side], rows: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each side and ratios to the first one, round by round; one more round warms up, in which
    FLOPs are counted."""
    out: dict[str, float] = {}
    for name, side in sides.items():
        out[f"{name}_parameters"] = sum(p.numel() for p in side.network.parameters())
    for what in ("train", "evaluate"):
        times: dict[str, list[float]] = {name: [] for name in sides}
        for name, side in sides.items():
            with FlopCounterMode(display=False) as counter:
                getattr(side, what)()
            out[f"{what}_{name}_gflop"] = counter.get_total_flops() / 1e9
        for _ in range(rounds):
            for name, side in sides.items():
                began = time.perf_counter()
                getattr(side, what)()
                times[name].append(time.perf_counter() - began)
        first = next(iter(sides))
        for name, values in times.items():
            middle = statistics.median(values)
            out[f"{what}_{name}_ms"] = 1e3 * middle
            out[f"{what}_{name}_images_per_second"] = rows / middle
            out[f"{what}_{name}_gflop_per_second"] = out[f"{what}_{name}_gflop"] / middle
            if name != first:
                ratios = [a / b for a, b in zip(times[first], values, strict=True)]
                out[f"{what}_{name}_over_{first}"] = statistics.median(ratios)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=list(SECTIONS), default="realnvp")
    parser.add_argument("--public", type=Path, help="checkout of the public implementation")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's threads; the default is torch's")
    parser.add_argument("--tiny", action="store_true", help="small networks: shows that everything runs")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)  # all sides alike
    section, pixels = SECTIONS[given.system], pictures(given.batch)
    sides: dict[str, Side] = {}
    found: dict[str, Any] = {"system": given.system, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if given.public:
        sides["public"] = section.public(given.public, pixels, given.tiny)
        found |= {"public": section.public_name}
        print(f"public: {section.public_name}")
        if section.difference:
            found["difference"] = section.difference(given.public, pixels[:2], given.tiny)
            print(f"under equal weights: largest difference {found['difference']:.1e}")
    for precision in ("fp32", "bf16"):
        sides[precision] = ours(section, pixels, precision, given.tiny)
    found |= measure(sides, given.batch, given.rounds)
    found |= {
        "batch": given.batch,
        "rounds": given.rounds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    for name in sides:
        print(f"  {name:6s} {found[f'{name}_parameters'] / 1e6:8.2f} M parameters")
    for what in ("train", "evaluate"):
        for name in sides:
            ratio = found.get(f"{what}_{name}_over_{next(iter(sides))}", 1.0)
            took, speed = (found[f"{what}_{name}_{unit}"] for unit in ("ms", "images_per_second"))
            flops = (
                f"{found[f'{what}_{name}_gflop']:7.1f} GFLOP {found[f'{what}_{name}_gflop_per_second']:6.0f} GFLOP/s"
            )
            print(f"  {what:8s} {name:6s} {took:8.1f} ms {speed:8.1f} images/s {flops}  x{ratio:.2f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
