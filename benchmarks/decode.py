"""Frames per second of the clip loader against plain PyAV reading of the same files, alternating in one run.

    python benchmarks/decode.py                                  # clips made for the purpose
    python benchmarks/decode.py --root /data/walks --workers 0 2 --frames 16 --size 64

Both read the same frames: the first window of every clip, and resize each to the target size. Plain reading opens a
file by name with PyAV's defaults, in one process. The loader checks, frames, collates and hands over batches; with
`--cache` it reads what it decoded before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import av
import torch
import torch.nn.functional as F

from condgen.data.base import BatchDataset, batches
from condgen.data.clips import Clips
from condgen.data.decode import resize
from condgen.show.clips import write_clip


def make_clips(folder: Path, count: int, frames: int, size: int) -> None:
    """H.264 clips of smooth noise that slides."""
    for number in range(count):
        noise = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(number))
        wide = F.interpolate(noise, size=(size + frames, size + frames), mode="bilinear")[0]
        write_clip(
            folder / f"{number:03d}.mp4", [wide[:, t : t + size, t : t + size] * 2 - 1 for t in range(frames)], fps=25
        )


def plain(paths: list[Path], frames: int, size: int) -> float:
    """Seconds to read the first frames of every file."""
    began = time.perf_counter()
    for path in paths:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == frames:
                    break
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24").transpose(2, 0, 1).copy())
                resize(pixels, (size, size), "crop")
    return time.perf_counter() - began


def loader(data: Clips, batch: int, workers: int, epochs: int) -> float:
    """Seconds to load every clip once, the start of the processes not counted."""
    feed = BatchDataset(data, data.provides, batch_size=batch, seed=0)
    each = len(data) // batch
    held = iter(batches(feed, start=0, stop=each * (epochs + 1), workers=workers))
    for _ in range(each):  # the first epoch starts the processes and learns where the frames are
        next(held)
    began = time.perf_counter()
    for _ in held:
        pass
    return (time.perf_counter() - began) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--source", type=int, default=240, help="pixels of a side of the clips that are made")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.cache:
            os.environ.setdefault("CONDGEN_CACHE", folder + "/cache")
        root = Path(given.root or folder + "/clips")
        if not given.root:
            make_clips(root, given.clips, given.frames * 2, given.source)
        data = Clips(
            root=str(root), size=given.size, split="all", frames=given.frames, window="first", cache=given.cache
        )
        paths = [row.path for row, _ in data.rows][: len(data) // given.batch * given.batch]
        frames = len(paths) * given.frames
        times: dict[str, list[float]] = {"plain PyAV": []} | {f"loader, {n} workers": [] for n in given.workers}
        for _ in range(given.rounds):
            times["plain PyAV"].append(plain(paths, given.frames, given.size))
            for workers in given.workers:
                times[f"loader, {workers} workers"].append(loader(data, given.batch, workers, 2))
    base = statistics.median(times["plain PyAV"])
    print(f"{len(paths)} clips, {given.frames} frames of {given.size} px each, median of {given.rounds} rounds")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:<20} {frames / middle:8.0f} frames/s   {base / middle:6.2f} x plain")


if __name__ == "__main__":
    main()
