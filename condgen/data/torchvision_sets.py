"""Public labelled sets through torchvision: MNIST, Fashion-MNIST, KMNIST, CIFAR-10, CIFAR-100, SVHN.

Read from where torchvision puts them below data.root; fetched only with data.download=true. The CIFAR files are
pickles: torchvision opens them only when they have the published MD5, so no other file is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from condgen.data._arrays import ArrayRows, Fit, Split, held_out
from condgen.errors import ConfigError, DataError
from condgen.options import Range

CLASSES = {
    "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
    "svhn": "SVHN",
}  # fmt: skip
Name = Literal["mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn"]


class TorchvisionSets(ArrayRows):
    """root: the folder that torchvision's class takes as `root`.

    dataset    which one
    size       pixels of a side; 0 = the set's own (28 or 32)
    fit        how pictures reach `size`: "resize", or "pad" in the middle of black (28 px digits in 32)
    flip       mirror half of the training rows; off, because digits have a direction
    classes    keep only these, renumbered in this order: numbers, names and ranges, [0,Sandal,"5-7"]; () = all
    val_share  share of the training rows that are the split "val" and are not trained on
    download   fetch the files when they are missing (torchvision checks their MD5)
    """

    def __init__(
        self,
        *,
        root: str,
        dataset: Name = "fashion_mnist",
        size: Annotated[int, Range(0)] = 32,
        split: Split = "train",
        fit: Fit = "resize",
        flip: bool = False,
        classes: Sequence[int | str] = (),
        val_share: Annotated[float, Range(0, 0.99)] = 0.0,
        download: bool = False,
    ) -> None:
        if dataset not in CLASSES:
            raise ConfigError(f"data.dataset={dataset!r}; allowed: {', '.join(CLASSES)}")
        pictures, labels, names = read(Path(root).expanduser(), dataset, split != "test", download)
        if split != "test":
            rows = held_out(len(pictures), val_share, split)
            pictures, labels = pictures[rows], labels[rows]
        super().__init__(
            pictures, labels, names, prefix=f"{dataset}-{split}", size=size, fit=fit, flip=flip, classes=classes
        )


def read(root: Path, dataset: str, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pictures uint8 (N, H, W[, 3]), labels (N,) and class names. Raises DataError with what torchvision says."""
    from torchvision import datasets

    cls: Any = getattr(datasets, CLASSES[dataset])
    which = {"split": "train" if train else "test"} if dataset == "svhn" else {"train": train}
    try:
        held = cls(str(root), download=download, **which)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{dataset} could not be read below data.root={root}: {str(error)[:200]}. Give the folder that holds "
            "torchvision's files, or set data.download=true"
        ) from error
    pictures = np.asarray(held.data)
    if dataset == "svhn":
        pictures = pictures.transpose(0, 2, 3, 1)  # stored channels first
    labels = np.asarray(held.labels if dataset == "svhn" else held.targets).astype(np.int64)
    names = getattr(held, "classes", None) or [str(digit) for digit in range(10)]
    return pictures, labels, tuple(names)
