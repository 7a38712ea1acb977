"""Tensors of systems and optimisers by name: what a checkpoint holds, and how it goes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from condgen.errors import CheckpointError

NAMED = 5  # how many names an error lists


def _under(name: str, submodules: Sequence[str]) -> bool:
    return not submodules or any(name == s or name.startswith(f"{s}.") for s in submodules)


def parameters_of(module: nn.Module, submodules: Sequence[str] = (), *, tied: bool = False) -> dict[str, nn.Parameter]:
    """Name -> parameter, limited to some submodules. A shared parameter has one name, or with `tied` all its names."""
    return {name: p for name, p in module.named_parameters(remove_duplicate=not tied) if _under(name, submodules)}


def persistent_buffers(module: nn.Module, submodules: Sequence[str] = ()) -> dict[str, Tensor]:
    """Name -> buffer of everything that belongs in a checkpoint, limited to some submodules."""
    found = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for key, value in child._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if value is not None and key not in child._non_persistent_buffers_set and _under(name, submodules):
                found[name] = value
    return found


def system_tensors(system: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers: the tensors of state_dict(), tied ones under each of their names."""
    return {**{n: p.detach() for n, p in parameters_of(system, tied=True).items()}, **persistent_buffers(system)}


@torch.no_grad()
def load_tensors(what: str, into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies by name into existing tensors, keeping their device and memory layout. Strict.

    CheckpointError lists the first missing, unexpected and misshapen names and copies nothing.
    """
    problems = []
    missing, extra = sorted(set(into) - set(tensors)), sorted(set(tensors) - set(into))
    wrong = [
        f"{n} {tuple(tensors[n].shape)} here {tuple(into[n].shape)}"
        for n in into
        if n in tensors and tensors[n].shape != into[n].shape
    ]
    for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong)):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            problems.append(f"{kind}: {', '.join(names[:NAMED])}{more}")
    if problems:
        raise CheckpointError(
            f"{what} of the checkpoint do not fit this system ({'; '.join(problems)}). "
            "Use the configuration that the run was started with, or start a new run"
        )
    for name, value in tensors.items():
        into[name].copy_(value)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State as "<parameter name>.<key>" -> tensor; parameters that were never updated have none."""
    out = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{name}.{key}"] = value
    return out


def load_optimizer(
    phase: str,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    keys: frozenset[str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restores by parameter name; `keys` is what this kind of optimiser keeps for an updated parameter.

    CheckpointError for unknown parameters, other keys (another optimiser) or other shapes.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        found.setdefault(name, {})[key] = value
    where = f"the optimiser of phase {phase!r}"
    unknown = sorted(set(found) - set(parameters))
    if unknown:
        raise CheckpointError(f"{where}: the checkpoint holds state for unknown parameters {unknown[:NAMED]}")
    for name, state in found.items():
        if set(state) != keys:
            raise CheckpointError(
                f"{where}: the checkpoint holds {sorted(state)} for {name}, this optimiser keeps {sorted(keys)}. "
                f"Give optim.{phase} the name and momentum that the run was started with"
            )
        parameter = parameters[name]
        restored = {}
        for key, value in state.items():
            counter = key == "step"
            if not counter and value.shape != parameter.shape:
                raise CheckpointError(f"{where}: {name}.{key} has shape {tuple(value.shape)}")
            # moments must share the layout of their parameter: fused kernels walk both in memory order
            like = torch.empty_like(value if counter else parameter).detach()
            on_host = counter and not optimizer.defaults.get("fused")
            restored[key] = like.to("cpu" if on_host else parameter.device, value.dtype).copy_(value)
        optimizer.state[parameter] = restored


def digest(data: bytes) -> str:
    """A short hash of bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A short hash of each tensor's values."""
    return {
        name: digest(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in tensors.items()
    }
