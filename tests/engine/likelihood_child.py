"""One of the processes of test_likelihood_processes.py: trains, starts and scores the likelihood systems."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_toys import StopAfter, everything, make_trainer
from safetensors.torch import save_file

from condgen import registry, rng
from condgen.data.base import RowDataset
from condgen.engine.optim import OptimOptions
from condgen.engine.world import World
from condgen.inference.sample import sample_over
from condgen.metrics import extractors, quality
from condgen.metrics.likelihood import bits_per_dim
from condgen.rng import StepRandom
from condgen.systems.base import System
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, Sample, TargetSpec

SPEC, TARGET = ConditionSpec(label=LabelSpec(3)), TargetSpec(3, 8, 8)
SGD = {"default": OptimOptions(name="sgd", lr=0.05, momentum=0.9, clip_norm=1.0)}
FLOW = {"scales": 2, "width": 4, "blocks": 1}
VAE = {"width": 4, "latent_dim": 3, "iaf_width": 6, "depth": 1}
CQF = {"width": 4, "discriminator_width": 4, "latent_dim": 3, "flow_width": 4, "flow_blocks": 1, "iaf_width": 8}
CNN = {"width": 6, "blocks": 1, "scales": 2, "kernel": 3, "mixtures": 2, "dropout": 0.0}
CASES = {
    "realnvp": ("realnvp", FLOW),
    "realnvp-batch": ("realnvp", {**FLOW, "norm": "batch"}),
    # with both norms, what a checkerboard hides is 0 after the norm up to rounding: the kink of the ReLU behind it
    "realnvp-net-batch": ("realnvp", {**FLOW, "norm": "none", "net_norm": "batch"}),
    "realnvp-lag": ("realnvp", {**FLOW, "norm": "batch", "batch_lag": 0.5, "affine": "paper"}),
    "vae": ("vae", VAE),
    "vae-iaf-uniform": ("vae", {**VAE, "posterior": "iaf", "law": "gaussian", "dequantisation": "uniform"}),
    "vae-ladder": ("vae", {**VAE, "architecture": "ladder", "posterior": "iaf", "scale": "predicted"}),
    "vae-iwae": ("vae", {**VAE, "architecture": "mlp", "importance": 3, "law": "bernoulli", "binarise": "dynamic"}),
    "vae-prior": ("vae", {**VAE, "prior": "conditional", "kl_warmup": 2, "beta": 2.0}),
    "vae-free-bits": ("vae", {**VAE, "free_bits": 0.0041}),  # above it on one process alone
    "cqf": ("cqf", CQF),
    "cqf-all": ("cqf", {
        **CQF, "residual": True, "iaf": True, "large_discriminator": True, "two_scales": True, "sample_mode": "noisy",
        "quality_start": 1, "kl_warmup": 3,
    }),
    "cqf-free-bits": ("cqf", {**CQF, "quality": False, "free_bits": 0.0041}),
    "cqf-gan": ("cqf", {**CQF, "coverage": False, "flow": False, "bound_start": 2}),
    "pixelcnn++": ("pixelcnn", CNN),
    "pixelcnn++softmax": ("pixelcnn", {**CNN, "likelihood": "softmax"}),
    "pixelcnn": ("pixelcnn", {**CNN, "architecture": "pixelcnn", "likelihood": "softmax"}),
    "gated": ("pixelcnn", {**CNN, "architecture": "gated", "likelihood": "softmax"}),
    "row_lstm": ("pixelcnn", {**CNN, "architecture": "row_lstm", "likelihood": "softmax"}),
    "diagonal_bilstm": ("pixelcnn", {**CNN, "architecture": "diagonal_bilstm"}),
}  # fmt: skip
STARTS = ("realnvp", "pixelcnn++", "cqf")
SCORED = ("realnvp", "vae-iaf-uniform", "cqf", "gated")


class Pictures(RowDataset):
    """Dark and bright pictures with a slope and some noise, 3x8x8, and a label."""

    provides, target = SPEC, TARGET

    def __len__(self) -> int:
        return 21

    def key(self, index: int) -> str:
        return f"row-{index}"

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        slope = torch.arange(8).view(1, 1, 8) * (index % 5 * 4) + 40 * (index % 3)
        noise = torch.randint(60, (3, 8, 8), generator=rng.generator("pictures", index))
        return Sample(self.key(index), (slope + noise).to(torch.uint8), label=index % 3)


def made(case: str) -> System:
    name, options = CASES[case]
    torch.manual_seed(1)
    return registry.load("systems", name, System)(condition=SPEC, target=TARGET, **options)


def trained(folder: Path, case: str, world: World, batch_size: int) -> dict[str, torch.Tensor]:
    """Everything that four steps from one seed leave behind."""
    trainer = make_trainer(
        folder / case, made(case), data=Pictures(), world=world, optim=SGD, steps=4, batch_size=batch_size,
        condition_drop=0.0, log_every=1,
    )  # fmt: skip
    trainer.train(stop=StopAfter(99))
    return everything(trainer)


def started(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Parameters and buffers after the first look at this rank's share of eight pictures, without any update."""
    system, data = made(case).train(), Pictures()
    rows = [data.sample(i, None) for i in range(8)][rank * 8 // world : (rank + 1) * 8 // world]
    pixels = torch.stack([row.target for row in rows]).float() / 127.5 - 1
    batch = Batch(pixels, Condition(label=torch.tensor([row.label for row in rows])))
    with torch.no_grad():
        for phase in system.phases():
            if phase.name != "discriminator":
                phase.loss(batch, StepRandom(3, phase.name, rows=len(rows), rank=rank, world=world))
    return {name: value.detach().clone() for name, value in system.state_dict().items()}


def scored(case: str, world: World | None) -> dict[str, list]:
    """Bits, samples and every score of sets: numbers and signatures by name."""
    system, data = made(case).eval(), Pictures()
    rows = [data.sample(i, None) for i in range(21)]
    real, label = torch.stack([row.target for row in rows]), torch.tensor([row.label for row in rows])
    about = {"data": "toy", "split": "test"}
    bits = bits_per_dim(
        system, real[:11], Condition(label=label[:11]), importance=3, batch_size=4, reference=real, about=about,
        world=world,
    )  # fmt: skip
    fake = sample_over(world or World(), system, Condition(label=label), seed=5, ids=range(21), batch_size=4)
    scores = quality.quality_scores(
        fake, real[:19].float() / 127.5 - 1, real.float() / 127.5 - 1, name="toy", about=about, metrics=["all"],
        force_fid=True, world=world,
    )  # fmt: skip
    out = {s.name: [s.value, s.error, s.floor, s.ceiling, s.signature] for s in [bits, *scores]}
    return {**out, "samples": [float(fake.double().sum()), float(fake.std())]}


def judge() -> None:
    """A small network with a head for every score of sets."""
    torch.manual_seed(7)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(), torch.nn.Flatten()).eval()
    head = torch.randn(54, 5)
    network = extractors.Extractor(
        "toy", "1", "none", lambda pixels: body(pixels.float() / 255), torch.device("cpu"), head=lambda x: x @ head
    )
    quality.extractor = lambda name, **more: network


def main() -> None:
    folder = Path(sys.argv[1])
    world = World.start(device="cpu", precision="fp32", seed=0)
    judge()
    started_here = {case: started(case, world.rank, world.world) for case in STARTS}
    for case in CASES:
        found = trained(folder, case, world, 4)
        if world.is_main:
            save_file({n: t.contiguous() for n, t in found.items()}, folder / f"{case}.safetensors")
    if world.is_main:
        for case, state in started_here.items():
            save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{case}-start.safetensors")
    out = {case: scored(case, world) for case in SCORED}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(out))
    world.close()


if __name__ == "__main__":
    main()
