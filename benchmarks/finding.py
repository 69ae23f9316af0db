"""Do windows hold the thing that is to be named, and what does it depend on?"""

from typing import Any

import torch
from photographs import Photographed
from torch import Tensor, nn

from timm_apvit import APViT
from timm_apvit.finetuning.evaluation import autocast

# Cells of an 8 x 8 grid that a thing's box covers, fewer than.
CELLS = (0.5, 1.0, 2.0, 4.0, float('inf'))
BATCH = 50


@torch.no_grad()
def finding(model: nn.Module, test: Photographed, amp: str | None, device: str) -> dict[str, Any]:
    """What a model finds and names in a test set.

    Returns:
        ``top1_by_cells``: for each of `CELLS` the number of things that cover fewer (and more than the one before), and
        the share of them that are named. Of a model with windows also ``held``, the share whose centre lies in the
        window, ``held_wholly``, ``held_by_cells``, ``extent``, the windows' mean half-extent, and ``glance_top1``, of
        the glance alone.
    """
    model = model.eval().to(device)
    boxes, right, windows, glances = [], [], [], []
    for start in range(0, len(test), BATCH):
        indices = range(start, min(start + BATCH, len(test)))
        samples = [test[i] for i in indices]
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([label for _, label in samples])
        with autocast(torch.device(device), amp):
            seen = model.patch_embed(images.to(device)) if isinstance(model, APViT) else images.to(device)
            right.append(model(seen).argmax(dim=1).cpu() == labels)
        boxes.append(torch.tensor([test.compose(i)[2] for i in indices]))
        if isinstance(model, APViT) and seen.geometry.window is not None:
            windows.append(seen.geometry.window.cpu())
            glances.append(seen.geometry.logits.argmax(dim=1).cpu() == labels)
    corners = 2 * torch.cat(boxes) / test.scene.side - 1  # (n, 4): left, top, right, bottom
    covered = 64 / 4 * (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    found = {'top1_by_cells': _by_cells(covered, torch.cat(right))}
    if not windows:
        return found
    window = torch.cat(windows)
    centre, extent = window[:, :2], window[:, 2:]
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    held = ((middle - centre).abs() < extent).all(dim=1)
    wholly = ((corners[:, :2] >= centre - extent) & (corners[:, 2:] <= centre + extent)).all(dim=1)
    return {
        **found,
        'held': float(held.float().mean()),
        'held_wholly': float(wholly.float().mean()),
        'held_by_cells': _by_cells(covered, held),
        'extent': float(extent.mean()),
        'glance_top1': float(torch.cat(glances).float().mean()),
    }


def _by_cells(covered: Tensor, true: Tensor) -> dict[str, tuple[int, float]]:
    shares, least = {}, 0.0
    for most in CELLS:
        chosen = true[(covered >= least) & (covered < most)]
        if len(chosen):
            shares[f'{least:g}-{most:g}'] = (len(chosen), float(chosen.float().mean()))
        least = most
    return shares
