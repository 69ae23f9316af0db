"""Guidance: where the transformer attends in whole images teaches the localisation network what matters in them.

What a model's last block attends to finds the object long before gradients through the sampling do: on the benchmark's
cluttered images the class token of a DINOv2 ViT-S/14, fine-tuned on 8 x 8 patches of 4,800 of them, had 73 % of its
attention on an object that, with half a patch around it, covers 13 % of the image. No teacher is needed: a share of the
images is seen whole, and there the model's own attention is the target of its saliency map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.finetuning.distillation import attention_on_grid
from timm_apvit.transforms import PatchGeometry

# The focus stays on the whole image for the first tenth of the training, in which attention finds its object, then
# closes in until four tenths. All at once after a tenth, it cost the benchmark's ViT-S/14 eight points for a while.
FOCUS_BEGINS, FOCUS_COMPLETE = 0.1, 0.4
# From this half-extent on a window counts as the whole image.
WHOLE = 0.9


def max_focus_at(progress: float, max_focus: float) -> float:
    """The bound on the focus at some point of the training.

    Args:
        progress: done of the training, in [0, 1].
        max_focus: in the end, above 1.

    Returns:
        Above 1 and at most ``max_focus``.
    """
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
