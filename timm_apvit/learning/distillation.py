"""Distillation: an objective that adds to the loss on the labels how far a model is from a teacher.

The logits are compared by the Kullback-Leibler divergence of Hinton et al. (https://arxiv.org/abs/1503.02531), the
pooled features by their cosine. The teacher's attention is a target for where patches go: together they are a density
over the image, which is to be that of the attention.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_apvit.models.attention import attends, calls_of, patch_attention
from timm_apvit.models.dense import overlaps
from timm_apvit.models.mixin import APViT
from timm_apvit.patching.anchors import Rows
from timm_apvit.patching.deterministic import resize
from timm_apvit.patching.geometry import PatchGeometry


class DistillationWeights(NamedTuple):
    """Weights of the terms of `DistillationTask`.

    Attributes:
        logits: share of the divergence of the logits in the loss; the labels have the rest.
        temperature: of both logits.
        token: weight of 1 - cosine between pooled features.
        attention: weight of the cross entropy between the teacher's attention and the density of the patches.
    """

    logits: float = 0.5
    temperature: float = 1.0
    token: float = 0.0
    attention: float = 0.0


class Outputs(NamedTuple):
    """Outputs of a model for a batch.

    Attributes:
        logits: ``(B, classes)``.
        features: ``(B, D)``, pooled, as the classifier takes them.
        geometry: of its patches; None: they are fixed, or it is a teacher.
        attention: of its last block to each patch, ``(B, N)``, without gradient, or of a teacher to each cell of
            ``grid``, ``(B, gh * gw)``; None: not asked for.
        grid: ``(gh, gw)`` of a teacher's attention.
    """

    logits: Tensor
    features: Tensor
    geometry: PatchGeometry | None = None
    attention: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


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
        self,
        model: nn.Module,
        input_size: tuple[int, int] | None = None,
        scale: Sequence[float] = (1.0,),
        shift: Sequence[float] = (0.0,),
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.input_size = input_size
        for name, values in (('scale', scale), ('shift', shift)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, attention: bool) -> Outputs:
        """Teach a batch ``(B, C, H, W)``, with the attention if that is asked for."""
        images = images * self.scale + self.shift
        if self.input_size is not None and images.shape[-2:] != self.input_size:
            images = resize(images, list(self.input_size), 'bilinear')
        outputs = outputs_of(self.model, images, attention=attention)
        received = outputs.attention
        if received is None:
            return outputs._replace(geometry=None)
        grid: tuple[int, int] = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[operator, union-attr]
        if outputs.geometry is not None:
            received = attention_on_grid(outputs.geometry, received, grid)
        return Outputs(outputs.logits, outputs.features, None, received, grid)


def outputs_of(model: nn.Module, images: Tensor, network: nn.Module | None = None, attention: bool = False) -> Outputs:
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
    return Outputs(logits, classified[0][0], geometry, received)


def check_attends(model: nn.Module) -> None:
    """Raise ValueError unless it is known how a model attends to its patches."""
    if not attends(model):
        raise ValueError(
            "expected one of timm's VisionTransformers with ordinary attention at its end for --attention-weight, "
            f'got a {type(model).__name__} without; leave it out'
        )


def attention_on_grid(geometry: PatchGeometry, attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay the attention to patches ``(B, N)`` on the cells that they cover: ``(B, gh * gw)``, sums of 1."""
    patch, cell, share, _ = overlaps(geometry, grid)
    covered = share.new_zeros(attention.numel()).index_add(0, patch, share)
    laid = share.new_zeros(len(attention) * grid[0] * grid[1])
    laid = laid.index_add(0, cell, attention.flatten()[patch] * share / covered[patch]).reshape(len(attention), -1)
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


class DistillationTask(ClassificationTask):  # type: ignore[misc]
    """timm's classification task whose loss has, besides that on the labels, terms of a frozen teacher.

    The logits of both are compared, their pooled features, and where the teacher attends with where patches lie.

    Args:
        model: to train.
        teacher: its teacher.
        weights: of the terms.
        kwargs: of timm's ``ClassificationTask``, such as ``criterion_kwargs={'smoothing': 0.1}``.

    Raises:
        ValueError: attention is to be learnt from a teacher of which it is not known how it attends.

    Example:
        >>> import timm, timm_apvit, torch
        >>> model, vit = timm.create_model('test_apvit', num_patches=49), timm.create_model('test_vit')
        >>> task = DistillationTask(model, Teacher(vit), DistillationWeights(attention=0.1), verbose=False)
        >>> result = task(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))
        >>> result['loss'].backward()
        >>> sorted(result)
        ['attention_loss', 'label_loss', 'logit_loss', 'loss', 'output']
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        weights: DistillationWeights = DistillationWeights(),  # noqa: B008  immutable
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if weights.attention > 0:
            check_attends(teacher.model)
        self.teacher, self.weights = teacher, weights

    def train(self, mode: bool = True) -> 'DistillationTask':
        """Set the mode of all but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images ``(B, C, H, W)`` and labels ``(B,)`` -> ``loss``, ``output`` (logits), and each term by its name."""
        model, weights = unwrap_model(self.trainable_module), self.weights
        taught = self.teacher(input, weights.attention > 0 and isinstance(model, APViT))
        outputs = outputs_of(model, input, self.trainable_module)
        label_loss = self.criterion(outputs.logits.float(), target)
        terms = {'label_loss': label_loss, **distillation_losses(outputs, taught, weights)}
        factors = {'label_loss': 1 - weights.logits, 'logit_loss': weights.logits}
        factors |= {'token_loss': weights.token, 'attention_loss': weights.attention}
        loss = torch.stack([factors[name] * value for name, value in terms.items()]).sum()
        return {'loss': loss, 'output': outputs.logits, **terms}


def distillation_losses(outputs: Outputs, taught: Outputs, weights: DistillationWeights) -> dict[str, Tensor]:
    """The terms of the loss that have a weight: ``logit_loss``, ``token_loss``, ``attention_loss``."""
    terms = {}
    if weights.logits > 0:
        student, teacher = (
            F.log_softmax(logits.float() / weights.temperature, dim=-1) for logits in (outputs.logits, taught.logits)
        )
        # Gradients fall with the square of the temperature.
        divergence = F.kl_div(student, teacher, log_target=True, reduction='batchmean')
        terms['logit_loss'] = weights.temperature**2 * divergence
    if weights.token > 0:
        terms['token_loss'] = 1 - F.cosine_similarity(outputs.features.float(), taught.features.float(), dim=-1).mean()
    if taught.attention is not None and outputs.geometry is not None:
        density = patch_density(outputs.geometry, taught.grid)
        # A cell out of reach of every patch has a density of 0 in float32.
        unlikely = torch.finfo(density.dtype).tiny
        terms['attention_loss'] = -(taught.attention * density.clamp(min=unlikely).log()).sum(dim=-1).mean()
    return terms
