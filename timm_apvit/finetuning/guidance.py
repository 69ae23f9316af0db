"""Guidance: what teaches the focus where to look.

Gradients through the sampling say nothing of what a window misses. Three lessons that do, for `FocusNetwork`:

- labels: the features under the saliency map are to name the class, as in attention-based multiple-instance learning
  (Ilse et al. 2018, https://arxiv.org/abs/1802.04712), so the map has to find what tells it;
- the attention of the transformer in images that it sees whole is the target of the map;
- the moments of its attention in a window, where it is finer, are the target of the window's adjustment.

No teacher is needed, and the backbone learns nothing from it. Attention teaches only if the transformer comes with
weights. From scratch it is spread over the clutter: maps that follow it stay flat, and windows that follow it grow to
the whole image. There the adjustment learns through the sampling.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_apvit.finetuning.distillation import Answer, attention_on_grid
from timm_apvit.finetuning.distributed import sum_over_processes, world_size
from timm_apvit.patching.focus import MAX_SHIFT, MAX_ZOOM, WHOLE, Focus, window_inside
from timm_apvit.patching.geometry import PatchGeometry
from timm_apvit.patching.layers import ZeroLinear

# The focus stays on the whole image for the first part of the training, in which labels and attention find what
# matters, then closes in.
FOCUS_BEGINS, FOCUS_COMPLETE = 0.08, 0.18
# Attention is squared before its moments are taken. Plain attention is also spread over what is around the object, the
# more so the larger the window is: windows that followed it grew to the whole image.
SHARPNESS = 2
# Half-extents of the window that is aimed at, in those of an even spread with the variance of squared attention, which
# is closer together than its object: an object's own are about 1.5 of these.
ROOM = 2.3
# Of the adjustment's loss beside the others.
ADJUSTMENT_WEIGHT = 3.0
# With fewer patches attention says nothing of how large something is.
FEWEST_PATCHES = 16
# Of the bounds of the adjustment: a target at a bound would drive its tanh to infinity.
REACH = 0.95


def with_detached_window(_: nn.Module, args: Any, found: Focus) -> Focus:
    """Hook of a `FocusNetwork`: no gradient through the sampling reaches its window."""
    return found._replace(window=found.window.detach())


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


class Guide(nn.Module):
    """The lessons of a model with focus; the classifier for the first one is needed in training only.

    Args:
        width: of the features under the saliency map.
        num_classes: of the labels.
        max_focus: of the model in the end.
        attention_weight: of what attention teaches beside the labels; 0: attention is not needed.
    """

    def __init__(self, width: int, num_classes: int, max_focus: float, attention_weight: float) -> None:
        super().__init__()
        self.classifier = ZeroLinear(width, num_classes)
        self.max_focus = max_focus
        self.attention_weight = attention_weight

    def forward(self, answer: Answer, labels: Tensor) -> Tensor:
        """The loss of a batch, given the model's answer and labels ``(B,)`` or ``(B, classes)``.

        Raises:
            ValueError: the answer says nothing of focus, or of attention that is to teach.
        """
        focus, geometry = answer.focus, answer.geometry
        if focus is None or geometry is None or geometry.window is None:
            raise ValueError('expected the answer of a model with max_focus above 1, got one without focus')
        # Autocast would round what patches cover, and with it the targets.
        with torch.autocast(labels.device.type, enabled=False):
            loss = F.cross_entropy(self.classifier(focus.summary.float()), labels)
            if self.attention_weight == 0:
                return loss
            if answer.attention is None:
                raise ValueError('expected an answer with attention, which is to teach, got none')
            whole = geometry.window[:, 2] >= WHOLE
            aim = attended_window(geometry, answer.attention, self.max_focus)
            # A weight of 0 rather than no lesson: several processes wait for each other's gradients, zeros too.
            weight = ADJUSTMENT_WEIGHT * (answer.attention.shape[1] >= FEWEST_PATCHES)
            taught = saliency_loss(focus, geometry, answer.attention, whole)
            return loss + self.attention_weight * (taught + weight * adjustment_loss(focus, aim, whole))

    def average_gradients(self) -> None:
        """Average the gradients over the processes, which all hold the same classifier."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad = sum_over_processes(parameter.grad) / world_size()


def saliency_loss(focus: Focus, geometry: PatchGeometry, attention: Tensor, whole: Tensor) -> Tensor:
    """Divergence of the saliency map from the attention ``(B, N)``, the mean over the images seen whole, ``(B,)``."""
    saliency = focus.saliency
    with torch.no_grad():
        target = attention_on_grid(geometry, attention, (saliency.shape[1], saliency.shape[2]))
    divergence = F.kl_div(saliency.flatten(1).log_softmax(dim=1), target, reduction='none').sum(dim=1)
    return (whole * divergence).sum() / whole.sum().clamp(min=1)


def adjustment_loss(focus: Focus, aim: Tensor, whole: Tensor) -> Tensor:
    """How far the adjustment is from windows that are aimed at, ``(B, 3)``: smooth L1, a mean over the batch.

    Images seen whole ``(B,)`` count for nothing, as there attention is coarse, and neither do those whose first window
    is the whole image, which is not adjusted, or does not have the middle of the aim in it.
    """
    with torch.no_grad():
        shift = (aim[:, :2] - focus.rough[:, :2]) / focus.rough[:, 2:]
        counts = ~whole & (focus.rough[:, 2] < WHOLE) & (shift.abs().amax(dim=1) < 1)
        furthest, most = REACH * MAX_SHIFT, REACH * math.log(MAX_ZOOM)
        log_scale = torch.log(aim[:, 2:] / focus.rough[:, 2:])
        target = torch.cat([shift.clamp(-furthest, furthest), log_scale.clamp(-most, most)], dim=1)
    distance = F.smooth_l1_loss(focus.adjustment, target, reduction='none', beta=0.2).sum(dim=1)
    return (counts * distance).mean()


@torch.no_grad()
def attended_window(geometry: PatchGeometry, attention: Tensor, max_focus: float) -> Tensor:
    """Window around where the attention ``(B, N)`` lies, `ROOM` times its spread: ``(B, 3)``."""
    share = (attention**SHARPNESS / (attention**SHARPNESS).sum(dim=1, keepdim=True)).unsqueeze(-1)
    centre = (share * geometry.centres).sum(dim=1)
    # Of an even spread over a half-extent e the variance is e^2 / 3; each patch is one of its own.
    variance = (share * ((geometry.centres - centre.unsqueeze(1)) ** 2 + geometry.extents**2 / 3)).sum(dim=1)
    extent = ROOM * math.sqrt(3) * variance.mean(dim=1, keepdim=True).sqrt()
    return window_inside(torch.cat([centre, extent], dim=1), max_focus)
