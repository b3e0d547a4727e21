"""scikit-learn's handwritten digits, split by row.

1797 images of 8 x 8 pixels, ten classes; scikit-learn ships them (the test part of UCI's optical
recognition of handwritten digits, CC BY 4.0). They are read from the installed package, never
copied here.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from testbed.corpus import SPLITS

HELD_OUT_ROWS = {"calibration": 150, "choosing": 150, "reporting": 400}


@dataclass(frozen=True)
class Digits:
    """`images` float32 `[count, 1, 8, 8]` from -1 (paper) to 1 (ink), `labels` int64 `[count]`."""

    images: Tensor
    labels: Tensor


def rows_of(split: str) -> list[int]:
    """Row numbers of one split (`training` or one of `SPLITS`), in a fixed mixed order."""
    order = sorted(range(1797), key=lambda row: hashlib.sha256(b"digit%d" % row).digest())
    start = 0
    for name in SPLITS:
        if name == split:
            return order[start : start + HELD_OUT_ROWS[name]]
        start += HELD_OUT_ROWS[name]
    return order[start:]


def load(split: str) -> Digits:
    """The images and labels of one split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = rows_of(split)
    images = torch.from_numpy(data.images[rows]).float().unsqueeze(1) / 8 - 1
    return Digits(images, torch.from_numpy(data.target[rows]).long())


def enlarge(images: Tensor) -> Tensor:
    """Images `[n, 1, 8, 8]` to `[n, 1, 24, 24]`, bilinear: neighbouring patches then say alike."""
    return functional.interpolate(images, scale_factor=3, mode="bilinear", align_corners=False)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """A shift by up to one pixel and a little noise, so that 1100 rows train a model well."""
    across, down = (int(x) for x in torch.randint(-1, 2, (2,), generator=generator))
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    shifted = padded[..., 1 + down : 9 + down, 1 + across : 9 + across]
    return shifted + 0.1 * torch.randn(images.shape, generator=generator)
