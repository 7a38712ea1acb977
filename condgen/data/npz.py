"""Labelled pictures in one .npz file: arrays x_train, y_train, x_test, y_test (the layout of Keras).

np.savez("mine.npz", x_train=x, y_train=y, x_test=xt, y_test=yt)   # uint8 (N, H, W[, C]), integers (N,)
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from condgen.data._arrays import ArrayRows, Fit, Split, held_out
from condgen.errors import ConfigError, DataError
from condgen.options import Range


class Npz(ArrayRows):
    """root: the .npz file. The arrays are read into memory; pickled ones are refused.

    size       pixels of a side; 0 = as stored
    fit        how pictures reach `size`: "resize", or "pad" in the middle of black (28 px digits in 32)
    flip       mirror half of the training rows
    classes    keep only these, renumbered in this order: numbers, names and ranges, [0,Sandal,"5-7"]; () = all
    names      names of the classes in the file; () = their numbers
    images, labels   how the arrays are called; `_train` or `_test` is appended
    val_share  share of the training rows that are the split "val" and are not trained on
    """

    def __init__(
        self,
        *,
        root: str,
        size: Annotated[int, Range(0)] = 0,
        split: Split = "train",
        fit: Fit = "resize",
        flip: bool = False,
        classes: Sequence[int | str] = (),
        names: Sequence[str] = (),
        images: str = "x",
        labels: str = "y",
        val_share: Annotated[float, Range(0, 0.99)] = 0.0,
    ) -> None:
        file = Path(root).expanduser()
        part = "test" if split == "test" else "train"
        pictures, numbers = read_arrays(file, (f"{images}_{part}", f"{labels}_{part}"))
        if part == "train" and len(pictures) == len(numbers):
            rows = held_out(len(pictures), val_share, split)
            pictures, numbers = pictures[rows], numbers[rows]
        count = 1 + int(numbers.max()) if numbers.size and np.issubdtype(numbers.dtype, np.integer) else 1
        if not names:  # both splits must agree on the classes
            (everyone,) = read_arrays(file, (f"{labels}_train",))
            count = max(count, 1 + int(everyone.max())) if everyone.size else count
        known = tuple(names) or tuple(map(str, range(count)))
        super().__init__(
            pictures, numbers, known, prefix=f"{file.stem}-{split}", size=size, fit=fit, flip=flip, classes=classes
        )


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an .npz file. ConfigError where there is no such file, DataError for what cannot be read."""
    if not file.is_file():
        raise ConfigError(f"data.root={str(file)!r} is not a file; data=npz reads one .npz file")
    try:
        with np.load(file, allow_pickle=False) as archive:
            absent = [name for name in names if name not in archive.files]
            if absent:
                raise DataError(
                    f"{file} has no array {absent[0]!r}; it holds {', '.join(archive.files)}. Set data.images and "
                    "data.labels to the names before _train and _test"
                )
            return [archive[name] for name in names]
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise DataError(f"{file} is not a readable .npz file without pickles: {error}") from error
