"""Distillation: what a teacher says about images, and how far a student is from it.

The logits are compared by the Kullback-Leibler divergence of Hinton et al. (https://arxiv.org/abs/1503.02531), the
pooled features by their cosine. The teacher's attention is a target for where patches go: together they are a density
over the image, which is to be that of the attention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_apvit.models.attention import attends, calls_of, patch_attention
from timm_apvit.models.dense import splat_weights
from timm_apvit.models.mixin import APViT
from timm_apvit.patching.anchors import Rows
from timm_apvit.patching.geometry import PatchGeometry


class Weights(NamedTuple):
    """What of the teacher counts how much.

    Attributes:
        logits: share of the divergence of the logits in the loss; the labels have the rest.
        temperature: of both logits.
        token: weight of 1 - cosine between pooled features.
        attention: weight of the cross entropy between the teacher's attention and the density of the patches.
    """

    logits: float
    temperature: float
    token: float
    attention: float


class Lesson(NamedTuple):
    """What a teacher says about a batch.

    Attributes:
        logits: ``(B, classes)``.
        features: ``(B, D)``, pooled, as the classifier takes them.
        attention: share of each cell of ``grid``, ``(B, gh * gw)``; None: not asked for.
        grid: ``(gh, gw)``.
    """

    logits: Tensor
    features: Tensor
    attention: Tensor | None
    grid: tuple[int, int]


class Answer(NamedTuple):
    """What a student says about a batch.

    Attributes:
        logits: ``(B, classes)``.
        features: ``(B, D)``, pooled, as the classifier takes them.
        geometry: of the student's patches; None: they are fixed.
        attention: of its last block to each patch, ``(B, N)``, without gradient; None: not asked for.
    """

    logits: Tensor
    features: Tensor
    geometry: PatchGeometry | None
    attention: Tensor | None = None


class Teacher(nn.Module):
    """A frozen model, and how images of the student become its own.

    Args:
        model: of timm.
        input_size: ``(h, w)`` to which images are resized; None: as they are.
        scale: factor on each channel of a student's image.
        shift: added to each channel then.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, input_size: tuple[int, int] | None, scale: list[float], shift: list[float]
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.input_size = input_size
        for name, values in (('scale', scale), ('shift', shift)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor, attention: bool) -> Lesson:
        """Teach a batch ``(B, C, H, W)``, with the attention if that is asked for."""
        images = images * self.scale + self.shift
        if self.input_size is not None and images.shape[-2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode='bilinear', antialias=True, align_corners=False)
        answer = observed(self.model, images, attention=attention)
        if answer.attention is None:
            return Lesson(answer.logits, answer.features, None, (0, 0))
        grid: tuple[int, int] = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator, union-attr]
        received = answer.attention
        if answer.geometry is not None:
            received = attention_on_grid(answer.geometry, received, grid)
        return Lesson(answer.logits, answer.features, received, grid)


def observed(model: nn.Module, images: Tensor, network: nn.Module | None = None, attention: bool = False) -> Answer:
    """Run a model once, and also return what its classifier took and where its patches lay.

    Args:
        model: of timm.
        images: ``(B, C, H, W)``.
        network: what wraps the model, and is called in its place.
        attention: whether to return what the last block attends to.
    """
    classifier: nn.Module = getattr(model, 'get_classifier')()  # noqa: B009  of every timm model
    layer: nn.Module | None = model.blocks[-1].attn if attention else None  # type: ignore[union-attr, index]
    patch_embed = model.patch_embed if isinstance(model, APViT) else None
    with (
        calls_of(classifier) as classified,
        calls_of(layer) as attended,
        calls_of(patch_embed) as seen,
    ):
        logits = (network or model)(images)
    # The last call of each: a glance called them before.
    with torch.no_grad():
        received = patch_attention(model, layer, attended[-1][0]) if attention else None
    geometry = seen[-1][1].geometry if seen else None
    return Answer(logits, classified[0][0], geometry, received)


def check_attends(model: nn.Module) -> None:
    """Raise ValueError unless it is known how a model attends to its patches."""
    if not attends(model):
        raise ValueError(
            "expected one of timm's VisionTransformers with ordinary attention at its end for --attention-weight, "
            f'got a {type(model).__name__} without; leave it out'
        )


def attention_on_grid(geometry: PatchGeometry, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay the attention to patches ``(B, N)`` on the cells that they cover: ``(B, gh * gw)``, sums of 1."""
    shares = splat_weights(geometry, grid)  # (B, gh * gw, N)
    laid = (shares / shares.sum(dim=1, keepdim=True) @ attention.unsqueeze(-1)).squeeze(-1)
    return laid / laid.sum(dim=1, keepdim=True)


def patch_density(geometry: PatchGeometry, grid: tuple[int, int]) -> Tensor:
    """Share of each cell of a grid in the patches: ``(B, gh * gw)``, sums of 1.

    Each patch counts alike, as a Gaussian over the cells whose deviation along each axis is the patch's half-extent in
    that direction. Unlike the patch itself it ends nowhere, so that cells which no patch covers draw patches to them.
    """
    cells = Rows(grid[0] * grid[1], grid[0]).anchors(geometry.centres.device).centres
    deviations = geometry.image_from_patch.norm(dim=-1)  # (B, N, 2)
    distances = (cells - geometry.centres.unsqueeze(2)) / deviations.unsqueeze(2)  # (B, N, gh * gw, 2)
    return torch.softmax(-0.5 * distances.square().sum(dim=-1), dim=-1).mean(dim=1)


def distilled_loss(loss: Tensor, answer: Answer, lesson: Lesson, weights: Weights) -> Tensor:
    """Add to the loss on the labels how far a student's answer is from a teacher's lesson."""
    if weights.logits > 0:
        student, teacher = (
            F.log_softmax(logits.float() / weights.temperature, dim=-1) for logits in (answer.logits, lesson.logits)
        )
        divergence = F.kl_div(student, teacher, log_target=True, reduction='batchmean')
        # Gradients fall with the square of the temperature.
        loss = (1 - weights.logits) * loss + weights.logits * weights.temperature**2 * divergence
    if weights.token > 0:
        cosine = F.cosine_similarity(answer.features.float(), lesson.features.float(), dim=-1)
        loss = loss + weights.token * (1 - cosine).mean()
    if lesson.attention is not None and answer.geometry is not None:
        density = patch_density(answer.geometry, lesson.grid)
        # A cell out of reach of every patch has a density of 0 in float32.
        unlikely = torch.finfo(density.dtype).tiny
        loss = loss - weights.attention * (lesson.attention * density.clamp(min=unlikely).log()).sum(dim=-1).mean()
    return loss
