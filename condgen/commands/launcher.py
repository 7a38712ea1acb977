"""Commands that a user can paste: this one again, or another one, started the way this one was."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def words(command: str, *, processes: int = 1) -> list[str]:
    """What starts `condgen COMMAND` from the current folder with this Python, on this many processes."""
    script = _script()
    if processes > 1:
        target = [script] if script else ["-m", "condgen", command]
        return [*_tool("torchrun", "torch.distributed.run"), f"--nproc-per-node={processes}", *target]
    if script is not None:
        return [_python(), str(Path(script).with_name(f"{command}.py"))]
    return [*_tool("condgen", "condgen"), command]


def typed() -> list[str]:
    """What was typed, as far as this process can see; a launcher's own options are not among it."""
    several = int(os.environ.get("WORLD_SIZE", "1"))
    skip = 1 if _script() else 2
    return [*words("train", processes=several), *sys.argv[skip:]]


def _script() -> str | None:
    """tools/<command>.py where that is how it was started."""
    path = Path(sys.argv[0])
    if path.parent.name != "tools" or path.suffix != ".py":
        return None
    return os.path.relpath(path)


def _python() -> str:
    found = shutil.which("python")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return _near(Path(sys.executable))


def _tool(name: str, module: str) -> list[str]:
    """A program of this environment by its bare name where the shell would find it, else through this Python."""
    found = shutil.which(name)
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return [name]
    return [_python(), "-m", module]


def _near(path: Path) -> str:
    """Relative to the current folder where the path is inside it (.venv/bin/python)."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
