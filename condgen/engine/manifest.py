"""What is in a checkpoint folder, how it is verified, and how older layouts are read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from condgen.disk import from_json, to_json
from condgen.errors import CheckpointError

SCHEMA = 1
MANIFEST, STATE, SUFFIX = "manifest.json", "state.json", ".safetensors"
STEP = re.compile(r"step-(\d{8,})")
MAX_JSON_BYTES = 64 * 2**20  # refuse to read more than this as text: a checkpoint may come from a stranger
_LITTER = re.compile(r"\.DS_Store|\.nfs[0-9a-f]+")  # written by file managers and network file systems, not by us


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all matched their manifest when it was opened.

    step    updates done, so training continues with this step number
    state   what `save` was given as JSON values (tuples come back as lists)
    """

    step: int
    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.manifest["groups"])

    def tensors(self, group: str, *, allow_nan: bool = False) -> dict[str, Tensor]:
        """Tensors of one group, on the CPU. Tied names share one tensor.

        Raises CheckpointError if there is no such group, if the file changed since it was verified, or if a
        tensor holds NaN: training on from NaN weights can only produce NaN. `allow_nan` reads them anyway.
        """
        entry = self.manifest["groups"].get(group)
        if entry is None:
            raise CheckpointError(f"{self.path} has no tensors named {group!r}; it has {', '.join(self.groups)}")
        data = _read_verified(self.path / entry["file"], self.manifest["files"][entry["file"]])
        try:
            found: dict[str, Tensor] = safetensors.torch.load(data)
            found |= {name: found[kept] for name, kept in entry["tied"].items()}
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path / entry['file']} is not a safetensors file: {error}") from error
        if not allow_nan:
            bad = [name for name, tensor in found.items() if _has_nan(tensor)]
            if bad:
                raise CheckpointError(
                    f"{self.path} holds NaN in {group}: {first(bad)}. Resume from an earlier step, "
                    "or force the load if you want to look at it"
                )
        return found


class Damaged(CheckpointError):
    """This folder does not match its manifest."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Opens one checkpoint folder and verifies every byte of it against its manifest. Raises CheckpointError."""
    try:
        return _read(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Checkpoint:
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path} is not a plain folder")
    manifest = _read_manifest(path)
    listed: dict[str, Any] = manifest["files"]
    present = {entry.name for entry in os.scandir(path) if not _LITTER.fullmatch(entry.name)} - {MANIFEST}
    if present != set(listed):
        missing, extra = sorted(set(listed) - present), sorted(present - set(listed))
        raise Damaged(f"{path}: missing files {missing}, files that its manifest does not list {extra}")
    for name, facts in listed.items():
        _check_file(path / name, facts)
    try:
        state = from_json(_read_verified(path / STATE, listed[STATE]))
        for schema in range(manifest["schema"], SCHEMA):
            manifest, state = MIGRATIONS[schema](manifest, state)
        _check_groups(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: {STATE} or {MANIFEST} has the wrong contents: {error!r}") from error
    if STEP.fullmatch(path.name) and path.name != f"step-{manifest['step']:08d}":
        raise Damaged(f"{path} says that it is step {manifest['step']}; it was renamed")
    return Checkpoint(manifest["step"], path, state, manifest)


def from_schema_0(manifest: dict[str, Any], state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Schema 0, the draft layout, called the step "iteration" and the averaged weights "average"; nothing was tied."""
    names = {"average": "ema"}
    files = [name for name in manifest["files"] if name.endswith(SUFFIX)]
    groups = {names.get(file.removesuffix(SUFFIX), file.removesuffix(SUFFIX)): file for file in files}
    renamed = {"step": state["iteration"], **{key: value for key, value in state.items() if key != "iteration"}}
    return {
        "schema": 1,
        "step": manifest["iteration"],
        "files": manifest["files"],
        "groups": {group: {"file": file, "tied": {}} for group, file in groups.items()},
    }, renamed


Migration = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
MIGRATIONS: dict[int, Migration] = {0: from_schema_0}
"""Schema number -> function that turns its manifest and state into those of the next number."""


def seal(body: dict[str, Any]) -> bytes:
    """Manifest bytes: the body and its own sha256, so that damage in the manifest shows too."""
    return to_json({**body, "sha256": hashlib.sha256(to_json(body)).hexdigest()}, indent=1)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise Damaged(f"{path} has no {MANIFEST}, so it is not a checkpoint")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise Damaged(f"{file} has {file.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        data = file.read_bytes()
        body = from_json(data)
        del body["sha256"]
        if seal(body) != data:
            raise ValueError("it does not match its own sha256")
        schema, files = body["schema"], body["files"]
        plain = all(type(facts["bytes"]) is int and type(facts["sha256"]) is str for facts in files.values())
        if type(schema) is not int or schema < 0 or not plain or STATE not in files:
            raise ValueError("a field has the wrong kind of value")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file} is damaged: {error}") from error
    if schema > SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema} and this condgen reads up to {SCHEMA}; "
            "use the condgen version in the run's environment.json, or a newer one"
        )
    return dict(body)


def _check_groups(manifest: Mapping[str, Any]) -> None:
    if type(manifest["step"]) is not int:
        raise ValueError("step is not an integer")
    for group, entry in manifest["groups"].items():
        tied = [*entry["tied"], *entry["tied"].values()]
        if entry["file"] not in manifest["files"] or not all(isinstance(name, str) for name in tied):
            raise ValueError(f"group {group} names no file of this folder")


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    if path.is_symlink() or not path.is_file():
        raise Damaged(f"{path} is not a plain file")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise Damaged(f"{path} has {size:,} bytes and its manifest says {facts['bytes']:,}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise Damaged(f"{path} does not match the sha256 in its manifest: its contents changed after saving")


def _read_verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    """The bytes that are parsed are the bytes that were hashed, even if the file changes in between."""
    if path.name == STATE and facts["bytes"] > MAX_JSON_BYTES:
        raise Damaged(f"{path} has {facts['bytes']:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    data = path.read_bytes()
    if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise Damaged(f"{path} does not match its manifest: its contents changed after saving")
    return data


def listed_bytes(path: Path) -> int:
    """Bytes of a checkpoint whose files are all there with the right sizes, otherwise 0; hashes are not read."""
    try:
        files = _read_manifest(path)["files"]
        fits = all((path / name).stat().st_size == facts["bytes"] for name, facts in files.items())
        return sum(facts["bytes"] for facts in files.values()) if fits else 0
    except (CheckpointError, OSError):
        return 0


def _has_nan(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return bool(torch.isnan(tensor.float() if tensor.element_size() == 1 else tensor).any())


def first(names: list[str], count: int = 5) -> str:
    """The first names of a list, with "..." if there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
