"""Frames per second of the clip loader, as a training uses it, against plain PyAV reading of the same windows.

    python benchmarks/decode.py                      # clips made for the purpose; a minute
    python benchmarks/decode.py --root /data/walks --workers 2 --frames 16 --size 64 --json FILE

Both sides give the same windows of the same files, drawn at random as in training, each frame resized to the target:
that the pixels are equal is checked before the clock starts. Plain reading opens the file, seeks to the keyframe before
the window, decodes up to its end and converts and resizes the wanted frames; in one process, and in as many as the
loader has workers. It is told where the window begins and checks nothing. "defaults" converts frames with PyAV's
defaults; "one thread" with threads=1, which is what the loader does. The loader checks, frames, collates and hands
over batches; cached, it reads what it decoded before. Rounds alternate all sides; ratios are medians of those of
the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from pix2pix import RESULTS, machine
from torch import Tensor

from condgen import rng
from condgen.data.base import BatchDataset, batches
from condgen.data.clips import Clips
from condgen.data.decode import cut, resize
from condgen.show.clips import write_clip

SEED = 0


@dataclass(frozen=True)
class Window:
    """The frames of one row: seconds of the first one, and how many follow without a gap."""

    path: Path
    seconds: float
    frames: int


def make_clips(folder: Path, count: int, frames: int, size: int) -> None:
    """H.264 clips of smooth noise that slides, with the keyframes that x264 sets by itself."""
    for number in range(count):
        noise = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(number))
        wide = F.interpolate(noise, size=(size + frames, size + frames), mode="bilinear")[0]
        write_clip(
            folder / f"{number:03d}.mp4", [wide[:, t : t + size, t : t + size] * 2 - 1 for t in range(frames)], fps=25
        )


def windows(feed: BatchDataset, data: Clips, start: int, stop: int) -> list[Window]:
    """Those that batches start..stop of the loader hold, by the same draws."""
    found = []
    for position in range(start * feed.batch_size, stop * feed.batch_size):
        epoch, index = feed.row(position)
        where = float(torch.rand(5, generator=rng.generator(SEED, "augment", epoch, index))[0])
        picks, known = data._picks(index, where), data._learn(index)
        assert known.times is not None, "the benchmark needs containers with times"
        found.append(Window(data.rows[index][0].path, float(known.times[picks[0]]), len(picks)))
    return found


def plain(window: Window, size: int, options: dict[str, int]) -> Tensor:
    """uint8 (frames, 3, size, size)."""
    kept: list[Tensor] = []
    with av.open(str(window.path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        first = round(window.seconds / stream.time_base)
        container.seek(first, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < first:
                continue
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", **options).transpose(2, 0, 1).copy())
            kept.append(cut(resize(pixels, (size, size), "crop")[0], (size, size))[0])
            if len(kept) == window.frames:
                break
    return torch.stack(kept)


def _share(task: tuple[Sequence[Window], int, dict[str, int]]) -> int:
    torch.set_num_threads(1)
    return sum(len(plain(window, task[1], task[2])) for window in task[0])


def plain_seconds(todo: Sequence[Window], size: int, options: dict[str, int], pool: multiprocessing.pool.Pool | None,
                  processes: int) -> float:  # fmt: skip
    began = time.perf_counter()
    if pool is None:
        _share((todo, size, options))
    else:
        pool.map(_share, [(todo[n::processes], size, options) for n in range(processes)], chunksize=1)
    return time.perf_counter() - began


def loader_seconds(feed: BatchDataset, start: int, stop: int, workers: int) -> float:
    """Seconds for batches start..stop; the processes start, and learn the files in one epoch, before."""
    each = -(-len(feed.data) // feed.batch_size)
    held = iter(batches(feed, start=start - each, stop=stop, workers=workers))
    for _ in range(each):
        next(held)
    began = time.perf_counter()
    for _ in held:
        pass
    return time.perf_counter() - began


def check_equal(feed: BatchDataset, data: Clips, size: int) -> None:
    """Both sides give the same pixels: otherwise they do not do the same work."""
    for window, target in zip(windows(feed, data, 0, 1), feed[0].batch.target, strict=True):
        if not torch.equal(plain(window, size, {}), target):
            raise SystemExit(f"{window.path.name}: plain reading and the loader give different pixels")


def measure(given: argparse.Namespace, root: Path) -> dict[str, object]:
    options = {"root": str(root), "size": given.size, "split": "all", "frames": given.frames}
    data, cached = Clips(**options), Clips(**options, cache=True)
    feeds = [BatchDataset(one, one.provides, batch_size=given.batch, seed=SEED) for one in (data, cached)]
    check_equal(feeds[0], data, given.size)
    each = -(-len(data) // given.batch)
    start, stop = 2 * each, (2 + given.epochs) * each
    todo, n = windows(feeds[0], data, start, stop), given.workers
    tuned = {"threads": 1}
    began = time.perf_counter()
    for index in range(len(cached)):
        cached.sample(index, None)
    fill = time.perf_counter() - began
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        pool.map(_share, [([], given.size, {})] * n)  # the start of the processes
        sides: dict[str, Callable[[], float]] = {
            "plain, 1 process, defaults": lambda: plain_seconds(todo, given.size, {}, None, 1),
            "plain, 1 process, one thread": lambda: plain_seconds(todo, given.size, tuned, None, 1),
            f"plain, {n} processes, defaults": lambda: plain_seconds(todo, given.size, {}, pool, n),
            f"plain, {n} processes, one thread": lambda: plain_seconds(todo, given.size, tuned, pool, n),
            "loader, 0 workers": lambda: loader_seconds(feeds[0], start, stop, 0),
            f"loader, {n} workers": lambda: loader_seconds(feeds[0], start, stop, n),
            f"loader, {n} workers, cached": lambda: loader_seconds(feeds[1], start, stop, n),
        }
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(given.rounds):
            for name, run in sides.items():
                taken[name].append(run())
    frames = len(todo) * given.frames
    found: dict[str, object] = {"clips": len(data), "frames": frames, "cache_fill_seconds": fill,
                                "cache_mib": cached.cache_bytes() / 2**20}  # fmt: skip
    base = list(sides)
    for name, times in taken.items():
        found[name] = {
            "frames_per_second": frames / statistics.median(times),
            "rounds_seconds": [round(seconds, 3) for seconds in times],
            **{f"times {other}": statistics.median(b / a for a, b in zip(times, taken[other], strict=True))
               for other in base[:4]},
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="a folder of videos, as data=clips reads it")
    parser.add_argument("--clips", type=int, default=32, help="made without --root")
    parser.add_argument("--source", type=int, default=240, help="pixels of a side of the clips that are made")
    parser.add_argument("--length", type=int, default=96, help="frames of the clips that are made")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "decode.json", help="where the figures go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, object] = {
        "machine": machine(), "cpus": os.cpu_count(), "torch": torch.__version__, "av": av.__version__,
        "load_before": os.getloadavg()[0], "rounds": given.rounds, "size": given.size, "window": given.frames,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONDGEN_CACHE"] = folder + "/cache"
        root = Path(given.root or folder + "/clips")
        if not given.root:
            make_clips(root, given.clips, given.length, given.source)
            record |= {"source": given.source, "length": given.length}
        record |= measure(given, root)
    for name, value in record.items():
        if isinstance(value, dict):
            ratios = "   ".join(f"{value[key]:5.2f}" for key in value if key.startswith("times"))
            print(f"{name:<34} {value['frames_per_second']:8.0f} frames/s   {ratios}")
    print("ratios: to the first four lines in their order")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
