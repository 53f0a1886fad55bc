"""The handwritten digits that ship with scikit-learn, split, normalized and lightly augmented."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from fastema.cli.demo.choices import TRAIN_IMAGES

SIDE = 8  # pixels
NOISE = (
    0.3  # in standard deviations of the pixels; with the shifts, it keeps 898 images hard enough
)


@dataclass(frozen=True)
class Digits:
    """One split of the data; pixels are normalized to mean 0, standard deviation 1."""

    shifted: Tensor  # (9, train, 1, 8, 8) f32: every training image, shifted by -1, 0, 1 pixels
    labels: Tensor  # (train,) i64
    test_images: Tensor  # (test, 1, 8, 8) f32
    test_labels: Tensor  # (test,) i64


def load(seed: int) -> Digits:
    """Load the 1,797 digits, split into halves stratified by class; `seed` selects the split."""
    bunch = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        torch.from_numpy(bunch.images).float().numpy(),
        bunch.target,
        train_size=TRAIN_IMAGES,
        stratify=bunch.target,
        random_state=seed,
    )
    mean, std = float(train_images.mean()), float(train_images.std())
    train = (torch.from_numpy(train_images)[:, None] - mean) / std
    background = -mean / std  # the normalized value of an empty pixel
    padded = F.pad(train, (1, 1, 1, 1), value=background)
    shifted = torch.stack(
        [padded[:, :, y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)]
    )
    return Digits(
        shifted=shifted,
        labels=torch.from_numpy(train_labels),
        test_images=(torch.from_numpy(test_images)[:, None] - mean) / std,
        test_labels=torch.from_numpy(test_labels),
    )


def batches(
    digits: Digits, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, shifted, noisy batches; drop an incomplete last batch."""
    shifts, images = digits.shifted.shape[:2]
    order = torch.randperm(images, generator=generator)
    for start in range(0, images - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        shift = torch.randint(shifts, (batch_size,), generator=generator)
        noise = torch.randn((batch_size, 1, SIDE, SIDE), generator=generator)
        yield digits.shifted[shift, chosen] + NOISE * noise, digits.labels[chosen]
