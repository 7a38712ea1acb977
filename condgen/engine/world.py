"""Where training runs: device, number format, processes. The only file that imports Accelerate."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from condgen import registry, rng
from condgen.errors import ConfigError
from condgen.options import timeout_seconds
from condgen.types import Batch

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def gains_from_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is faster than fp32 on this hardware.

    CUDA with native bf16, or a CPU with AMX tiles or avx512_bf16 (measured without AMX: convolutions 1.9x).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private names that may go away
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run, and how numbers are held.

    device          where the system lives
    rank, world     this process and how many there are
    precision       fp32, or the autocast type bf16 or fp16
    channels_last   convolution weights and pixels are kept with channels innermost
    control         process group on the host for flags and small objects; None with one process
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    precision: str = "fp32"
    channels_last: bool = True
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def start(device: str = "auto", precision: str = "auto", seed: int = 0) -> World:
        """Joins the processes that `accelerate launch` or torchrun started, or starts alone.

        device is auto, cpu or cuda; precision is auto, fp32, bf16 or fp16 (CUDA only). Seeds torch's global
        generators with `seed`, so that systems built next are equal on every process. ConfigError for a
        device that is not there.
        """
        from accelerate.state import PartialState

        for what, given, allowed in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
            if given not in allowed:
                raise ConfigError(registry.unknown(what, given, list(allowed)))
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("train.device=cuda, but torch sees no GPU; use train.device=auto or cpu")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if not dist.is_initialized():
            PartialState._reset_state()  # a singleton: forget the device of an earlier run in this process
        wait = timedelta(seconds=timeout_seconds())
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # without cpu=True, Accelerate starts N unconnected processes on a machine without GPU
        state = PartialState(cpu=on_cpu, **({"timeout": wait} if several else {}), **_backend(on_cpu, several))
        chosen = torch.device(state.device)
        if chosen.type == "cpu":
            torch.set_flush_denormal(True)  # a saturated critic makes denormals: up to 15x slower
        control: Any = dist.new_group(backend="gloo", timeout=wait) if state.num_processes > 1 else None
        torch.manual_seed(rng.derive(seed, "start"))
        return World(
            device=chosen,
            rank=state.process_index,
            world=state.num_processes,
            precision=_resolve(precision, chosen),
            control=control,
        )

    def close(self) -> None:
        """Leaves the process group; afterwards `start` may be called again."""
        from accelerate.state import PartialState

        if dist.is_initialized():
            dist.destroy_process_group()
        if self.device.type == "cpu":
            torch.set_flush_denormal(False)  # as torch starts: what runs next may want exact floats
        PartialState._reset_state()

    # modules and numbers

    def place(self, module: nn.Module) -> nn.Module:
        """Moves a module to the device, in place; 4-d and 5-d parameters become channels-last where asked for."""
        module.to(self.device)
        if self.channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            for parameter in module.parameters():
                if parameter.dim() in formats:
                    parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
        return module

    def place_batch(self, batch: Batch) -> Batch:
        """The batch on the device with float pixels; channels innermost where asked for."""
        batch = batch.to(self.device, non_blocking=True).as_float()
        if not self.channels_last:
            return batch
        target = batch.target
        if target.dim() == 4:
            target = target.contiguous(memory_format=torch.channels_last)
        elif target.dim() == 5:  # (B, T, C, H, W): every frame channels-last, so (B, C, T, H, W) is channels_last_3d
            frames = target.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            target = frames.unflatten(0, target.shape[:2])
        object.__setattr__(batch, "target", target)  # a new record already; its constructor would check nothing more
        return batch

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward passes run inside this."""
        if self.precision == "fp32":
            return nullcontext()
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=kind)

    def scaler(self) -> torch.amp.GradScaler | None:
        """A new loss scaler where the precision needs one (fp16); one per optimiser."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """torch's DDP round the module, or the module itself with one process.

        Buffers are not broadcast: batch norm is synchronised or averaged, and pools belong to their rank.
        """
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        kind = nn.parallel.DistributedDataParallel
        known = inspect.signature(kind.__init__).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in 2.15
        options: dict[str, Any] = {buffers: False}
        return kind(module, device_ids=ids, find_unused_parameters=False, **options)

    def seed(self, *parts: int | str) -> None:
        """Seeds torch's global generators of this process (dropout). Cheaper than torch.manual_seed."""
        value = rng.derive(*parts)
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    # agreement between processes; every process must call these in the same order

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: True where any process says True. One reduction on the host for all of them."""
        if self.world == 1:
            return flags
        held = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(value) for value in held.tolist())

    def any(self, flag: bool) -> bool:
        """True where any process says True."""
        return self.agree(flag)[0]

    def objects(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.control)
        return held[0]

    def mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Each named scalar, averaged over the processes that have it. One copy from the device for all."""
        own = to_floats(values)
        if self.world == 1:
            return own
        parts = self.objects(own)
        out = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            held = [part[name] for part in parts if name in part]
            out[name] = sum(held) / len(held)
        return out

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows (dimension 0) of every process joined in the order of ranks; their number may differ."""
        if self.world == 1:
            return tensor
        sizes = self.objects(len(tensor))
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @torch.no_grad()
    def copy_from_main(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites each tensor by rank 0's."""
        if self.world > 1:
            for value in tensors.values():
                sent = value.detach().clone(memory_format=torch.contiguous_format)
                dist.broadcast(sent.view(-1).view(torch.uint8), src=0)  # bytes: gloo does not know every dtype
                value.copy_(sent)

    @torch.no_grad()
    def average(self, tensor: Tensor) -> Tensor:
        """The mean over processes of equally shaped tensors; a new tensor."""
        out = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self.world > 1:
            dist.all_reduce(out)
            out /= self.world
        return out

    def barrier(self) -> None:
        """Waits for every process."""
        if self.world > 1:
            dist.barrier(group=self.control)


def to_floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Scalars as Python numbers, with one copy from the device for all of them."""
    tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
    out = {name: v for name, v in values.items() if not isinstance(v, Tensor)}
    if tensors:
        stacked = torch.stack([v.detach().reshape(()).to(torch.float64) for v in tensors.values()])
        out.update(zip(tensors, stacked.tolist(), strict=True))
    return {name: float(out[name]) for name in values}


def _backend(on_cpu: bool, several: bool) -> dict[str, str]:
    return {"backend": "gloo"} if on_cpu and several else {}


def _resolve(precision: str, device: torch.device) -> str:
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError("precision=fp16 needs a GPU; use precision=auto, bf16 or fp32")
    if precision == "auto":
        return "bf16" if gains_from_bf16(device) else "fp32"
    return precision
