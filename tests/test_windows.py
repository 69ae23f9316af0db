"""The window that is worth most on a map."""

import numpy as np
import pytest
import torch

from timm_apvit.patching.windows import EXTENTS, GAIN, SHARPNESS, best_window


def test_best_window_is_the_best_of_all_windows():
    saliency = 3 * torch.randn(30, 7, 9)
    found = best_window(saliency, 8.0)
    share = (SHARPNESS * saliency).flatten(1).softmax(dim=1).reshape(30, 7, 9).numpy()
    x, y = ((2 * np.arange(n) + 1) / n - 1 for n in (9, 7))
    for map_, window in zip(share, found.numpy(), strict=True):
        best, expected = 1.0 + 1e-4, np.array([0.0, 0.0, 1.0])
        for size in EXTENTS:
            rows, columns = round(size * 7), round(size * 9)
            extent = max(rows / 7, columns / 9)
            for row in range(7 - rows + 1):
                for column in range(9 - columns + 1):
                    worth = map_[row : row + rows, column : column + columns].sum() / extent**GAIN
                    if worth > best:
                        best = worth
                        cx, cy = (2 * column + columns) / 9 - 1, (2 * row + rows) / 7 - 1
                        held = map_ * (np.abs(y - cy) <= extent)[:, None] * (np.abs(x - cx) <= extent)
                        mean = [(held.sum(0) * x).sum(), (held.sum(1) * y).sum()] / held.sum()
                        expected = np.array([*mean.clip(extent - 1, 1 - extent), extent])
        np.testing.assert_allclose(window, expected, atol=1e-4)


@pytest.mark.parametrize('size', [(1, 1), (2, 2), (8, 8), (5, 11)])
def test_a_flat_map_is_the_whole_image(size):
    assert torch.equal(best_window(torch.full((2, *size), 3.0), 8.0), torch.tensor([[0.0, 0.0, 1.0]] * 2))


def test_convention_of_windows_is_x_then_y():
    saliency = torch.zeros(1, 8, 8)
    saliency[0, 1, 6] = 20.0
    x, y, extent = best_window(saliency, 8.0)[0].tolist()
    assert (x > 0.3, y < -0.3, extent < 0.5) == (True, True, True)


def test_no_window_is_smaller_than_it_may_be():
    saliency = torch.zeros(1, 12, 12)
    saliency[0, 2, 9] = 20.0
    assert [round(best_window(saliency, focus)[0, 2].item(), 2) for focus in (1, 1.5, 2, 3, 8)] == [
        1,
        0.75,
        0.5,
        0.33,
        0.33,
    ]
