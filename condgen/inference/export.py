"""The portable form of a trained system: `config.json` + `model.safetensors`, read by `condgen.load` and the Hub.

Nothing in an export folder is executed: weights are safetensors, everything else is JSON, the system is found
by name among the installed ones and checked against the weights before memory is allocated. Integrity is
checked (sha256), authorship is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from condgen import __version__, registry
from condgen.disk import replace_file, sync_folder, write_file
from condgen.errors import CheckpointError, CondgenError, ConfigError
from condgen.systems.base import System, Trainable
from condgen.types import ConditionSpec, TargetSpec

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 16 * 2**20
MAX_WEIGHT_BYTES = 16 * 2**30
MAX_TARGET_VALUES = 2**28  # per sample; a hostile size must not be able to fill the memory


@dataclass(frozen=True)
class ExportInfo:
    """Everything but the weights that sampling needs; no data set, tracker or training configuration.

    system      registry name; options: keyword options of its constructor
    text        encoder (name), tokens (bool), length (int), fingerprint; empty without text
    data        name, label_names, attribution
    modules     submodules whose weights are stored, () = the whole system; set by `write_export`
    """

    system: str
    condition: ConditionSpec
    target: TargetSpec
    options: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    version: str = __version__
    modules: tuple[str, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, from the data set or the label spec; may be empty."""
        spec = self.condition.label
        return tuple(self.data.get("label_names") or (spec.names if spec is not None else ()))

    @property
    def attribution(self) -> str:
        return str(self.data.get("attribution") or "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Raises CheckpointError for an option that JSON cannot hold."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out |= {"condition": self.condition.to_dict(), "target": dataclasses.asdict(self.target)}
        try:
            plain: dict[str, Any] = json.loads(json.dumps(out, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the options of {self.system} cannot be written as JSON ({error}); "
                "constructor options must be numbers, strings, booleans, or lists and mappings of them"
            ) from error
        return plain

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "the export") -> ExportInfo:
        """Checks format, types and sizes; CheckpointError names the key that is missing or wrong."""
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{source} has format {_short(data.get('format'))} (written by condgen "
                f"{data.get('version', 'unknown')}); condgen {__version__} reads format {FORMAT}"
            )
        kinds: dict[str, type] = {
            "system": str, "condition": dict, "target": dict, "options": dict, "text": dict, "task": str,
            "data": dict, "step": int, "version": str, "modules": list,
        }  # fmt: skip
        for name, kind in kinds.items():
            if name not in data:
                raise CheckpointError(f"{source} has no entry {name!r}; export the run again")
            if not isinstance(data[name], kind):
                raise CheckpointError(f"{source}: {name} is {_short(data[name])}; expected a JSON {_JSON_NAMES[kind]}")
        try:
            condition, target = ConditionSpec.from_dict(data["condition"]), TargetSpec(**data["target"])
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{source}: condition or target cannot be read: {error}") from error
        _check_sizes(condition, target, source)
        values = {name: data[name] for name in kinds}
        values |= {"condition": condition, "target": target, "modules": tuple(map(str, data["modules"]))}
        return ExportInfo(**values)


_JSON_NAMES = {str: "string", dict: "object", int: "integer", list: "array"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _check_sizes(condition: ConditionSpec, target: TargetSpec, source: str) -> None:
    values = 1
    for name, size in dataclasses.asdict(target).items():
        if type(size) is not int or size < (0 if name == "frames" else 1):
            raise CheckpointError(f"{source}: target.{name} is {size!r}; expected a positive integer")
        values *= max(size, 1)
    if values > MAX_TARGET_VALUES:
        raise CheckpointError(f"{source}: one sample would hold {values:,} values; the limit is {MAX_TARGET_VALUES:,}")
    for kind, spec in condition.items():
        for name, size in dataclasses.asdict(spec).items():
            if isinstance(size, int | float) and (not isinstance(size, int) or not 0 <= size <= 2**24):
                raise CheckpointError(f"{source}: condition.{kind}.{name} is {size!r}; out of range")


# writing


def exported(system: Trainable) -> dict[str, Tensor]:
    """The tensors that sampling needs, named as in the system's state_dict: `System.generates`, or all."""
    return only_generating(system.state_dict(), system.generates)


def only_generating(tensors: Mapping[str, Tensor], generates: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that belong to the submodules `generates`; () = all of them."""
    return {
        k: t for k, t in tensors.items() if not generates or any(k == n or k.startswith(f"{n}.") for n in generates)
    }


def write_export(
    folder: Path | str, system: Trainable, ema_tensors: Mapping[str, Tensor], manifest: ExportInfo
) -> Path:
    """Writes the folder as a whole or not at all; an older export there is replaced.

    ema_tensors   averaged weights under the system's names; what they lack is taken from the system itself
    """
    folder = Path(folder)
    own = exported(system)
    strange = sorted(set(ema_tensors) - set(system.state_dict()))
    if strange:
        raise CheckpointError(f"{manifest.system} has no tensors named {', '.join(strange[:5])}; wrong EMA weights")
    # clones: safetensors refuses tensors that share memory (tied weights)
    tensors = {k: ema_tensors.get(k, t).detach().to("cpu", copy=True).contiguous() for k, t in own.items()}
    bad = [k for k, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(f"not exported: {', '.join(bad[:5])} hold NaN or inf; the weights have diverged")
    weights = save(tensors, metadata={"format": "pt"})
    info = dataclasses.replace(manifest, modules=tuple(system.generates))
    config = {"format": FORMAT, **info.to_dict(), "torch": torch.__version__, "value_range": [-1, 1]}
    config["weights"] = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    replace_folder(folder, {WEIGHTS: weights, CONFIG: text.encode()})
    return folder


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """A folder holding exactly `files`: written beside it, synced, then renamed into place."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; give the folder itself")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp, old = (folder.with_name(f".{kind}-{folder.name}-{os.getpid()}") for kind in ("tmp", "old"))
    for stale in (temp, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temp.mkdir()
        for name, content in files.items():
            write_file(temp / name, content)
        sync_folder(temp)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temp, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise CheckpointError(f"could not write {folder}: {error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_info(path: Path | str, info: ExportInfo) -> Path:
    """Describes a system without its weights: `RUN/system.json`, so that a run can be sampled before it is exported."""
    path = Path(path)
    replace_file(path, (json.dumps({"format": FORMAT, **info.to_dict()}, indent=2) + "\n").encode())
    return path


# reading


def is_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MiB."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; an export folder holds {CONFIG} and {WEIGHTS}")
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; more than {MAX_CONFIG_BYTES:,} are not read")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {_short(data)}; expected a JSON object")
    return data


def read_export(folder: Path | str, *, max_bytes: int = MAX_WEIGHT_BYTES) -> tuple[ExportInfo, dict[str, Tensor]]:
    """(info, tensors) after checking format, sizes and sha256. Raises CheckpointError."""
    folder = Path(folder)
    data = read_config(folder / CONFIG)
    info = ExportInfo.from_dict(data, str(folder / CONFIG))
    path, stated = folder / WEIGHTS, data.get("weights")
    if not isinstance(stated, dict) or not {"bytes", "sha256"} <= set(stated):
        raise CheckpointError(f"{folder / CONFIG} states no size and sha256 of the weights; export the run again")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole export folder")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes; the limit is {max_bytes:,}")
    if size != stated["bytes"]:
        raise CheckpointError(f"{path} has {size:,} bytes, {CONFIG} says {stated['bytes']}; the copy is incomplete")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != stated["sha256"]:
        raise CheckpointError(f"{path} does not match the sha256 in {CONFIG}; the file is damaged, copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            return info, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


# building


def make_system(info: ExportInfo, tensors: Mapping[str, Tensor], source: str, *, whole: bool = False) -> System:
    """The system on the CPU in eval mode, with only the submodules that sampling needs.

    whole: `tensors` are those of a checkpoint, critics included, and what sampling does not need is passed over.
    Names and shapes are compared on the meta device first, so a config that asks for a huge network is
    refused before memory is allocated. Raises CheckpointError naming the first five wrong keys of each sort.
    """
    cls = registry.load("systems", info.system, Trainable)
    if not issubclass(cls, System) and not hasattr(cls, "complete"):
        raise ConfigError(
            f"{source} holds {info.system}, which makes no pictures; it serves other runs, as text.encoder"
        )
    options = _known_options(cls, info, source)
    try:
        with torch.device("meta"):
            sketch: System | None = cls(condition=info.condition, target=info.target, **options)
    except CondgenError:
        raise
    except Exception:
        sketch = None  # some constructors compute values, which meta tensors cannot; the real one is checked below
    if sketch is not None:
        tensors = only_generating(tensors, sketch.generates) if whole else tensors
        check_fits(exported(sketch), tensors, source)
    with torch.random.fork_rng(devices=[]):
        try:
            system: System = cls(condition=info.condition, target=info.target, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source}: {info.system} refuses the stored options: {error}") from error
    keep_generating(system)
    load_exported(system, only_generating(tensors, system.generates) if whole else tensors, source)
    return system.eval()


def keep_generating(system: System) -> None:
    """Removes submodules that `System.generates` does not name: critics cost memory and never sample."""
    names = tuple(system.generates)  # read once: it may be a property that looks at the modules
    for name, module in list(system._modules.items()):
        if names and module is not None and not any(n == name or n.startswith(f"{name}.") for n in names):
            delattr(system, name)


def load_exported(system: System, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies `tensors` into the exported part of the system; strict in names, shapes and finite values."""
    own = exported(system)
    check_fits(own, tensors, source)
    bad = [k for k, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(f"{source}: {', '.join(bad[:5])} hold NaN or inf; the weights have diverged")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_fits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError unless both have the same names and shapes."""
    shapes = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in given and given[k].shape != own[k].shape
    ]
    found = {
        "missing": sorted(set(own) - set(given)),
        "unexpected": sorted(set(given) - set(own)),
        "wrong shape": sorted(shapes),
    }
    lines = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in found.items()
        if names
    ]
    if lines:
        raise CheckpointError(f"the weights of {source} do not fit the system; " + "; ".join(lines))


def _known_options(cls: type, info: ExportInfo, source: str) -> dict[str, Any]:
    known = {p.name: p for p in registry.constructor_options(cls)}
    unknown = sorted(set(info.options) - set(known) | {"condition", "target"} & set(info.options))
    if unknown:
        raise CheckpointError(
            f"{source}: {info.system} has no options {', '.join(unknown)}; it was written by condgen {info.version}, "
            f"this is {__version__}"
        )
    # JSON has no tuples; options annotated as tuple get them back
    return {
        k: tuple(v) if isinstance(v, list) and "tuple" in str(known[k].annotation) else v
        for k, v in info.options.items()
    }
