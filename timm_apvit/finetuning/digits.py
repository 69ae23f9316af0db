"""Embedded images to fine-tune on: the real digits in scikit-learn, each placed among pieces of others."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from timm_apvit.failures import require
from timm_apvit.finetuning.clutter import ClutteredObjects
from timm_apvit.finetuning.samples import Splits

# The test digits are the same whatever the seed of a run, so that no run is tested on digits another was trained on.
SPLIT_SEED = 0
TEST_FRACTION = 0.2


def load_embedded_digits(
    seed: int,
    input_size: tuple[int, int, int],
    length: int = 8_000,
    test_length: int = 1_000,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> Splits:
    """Make cluttered digits out of scikit-learn's 1,797 real ones, a fifth of which are kept for the test."""
    require('sklearn', 'what has no DATA')
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.images))
    n_test = round(TEST_FRACTION * len(order))

    def split(chosen: NDArray[np.int64], n: int, seed: int) -> ClutteredObjects:
        images, labels = digits.images[chosen].astype(np.float32) / 16, digits.target[chosen].astype(np.int64)
        return ClutteredObjects(images, labels, n, seed, input_size, mean, std)

    names = tuple(str(name) for name in digits.target_names)
    return Splits(split(order[n_test:], length, seed), split(order[:n_test], test_length, SPLIT_SEED), names)
