"""Guidance: where the transformer attends in whole images teaches the localisation network what matters in them.

What a model's last block attends to finds the object long before gradients through the sampling do: the class token of
a fine-tuned DINOv2 ViT-S/14 on 8 x 8 patches had 73 % of its attention on an object that, with a margin, covers 13 % of
the image. No teacher is needed: a share of the images is seen whole, and there the model's own attention is the target
of its saliency map (as LookWhere distils that of a dense teacher).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.finetuning.distillation import attention_on_grid
from timm_apvit.transforms import PatchGeometry

# The focus stays on the whole image for the first tenth of the training, in which attention finds its object, and is
# at its closest from there on to four tenths. All at once it costs ten points for a third of the training.
FOCUS_BEGINS, FOCUS_COMPLETE = 0.1, 0.4
# From this half-extent on a window counts as the whole image.
WHOLE = 0.9


def max_focus_at(progress: float, max_focus: float) -> float:
    """How close anchors may come at some ``progress`` in [0, 1] of the training, of ``max_focus`` in the end."""
    done = (progress - FOCUS_BEGINS) / (FOCUS_COMPLETE - FOCUS_BEGINS)
    # Never 1, which is a model that has no focus to learn.
    return float(max_focus ** min(1.0, max(0.001, done)))


def saliency_loss(geometry: PatchGeometry, attention: Tensor) -> Tensor:
    """Divergence of the saliency map from the attention ``(B, N)``, the mean over the images that were seen whole.

    Raises:
        ValueError: the model has no focus.
    """
    saliency, window = geometry.saliency, geometry.window
    if saliency is None or window is None:
        raise ValueError('expected the geometry of a model with max_focus above 1, got one without a saliency map')
    with torch.no_grad():
        target = attention_on_grid(geometry, attention, (saliency.shape[1], saliency.shape[2]))
        whole = (window[:, 2] >= WHOLE).float()
    divergence = F.kl_div(saliency.flatten(1).log_softmax(dim=1), target, reduction='none').sum(dim=1)
    return (whole * divergence).sum() / whole.sum().clamp(min=1)
