"""Parameter groups of an optimiser: what an APViT has beyond a ViT, its backbone and its classifier, at their rates."""

from collections.abc import Collection
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from timm_apvit.models.checkpoint import ADAPTIVE_KEYS

ADAPTIVE, BACKBONE, HEAD = 'adaptive', 'backbone', 'head'


def roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """The role of each parameter: ``'adaptive'``, of the layers that a ViT lacks, ``'backbone'`` or ``'head'``."""
    classifier: nn.Module = getattr(model, 'get_classifier')()  # noqa: B009  of every timm model
    found = dict.fromkeys(model.parameters(), BACKBONE)
    found.update({p: ADAPTIVE for name, p in model.named_parameters() if name.startswith(ADAPTIVE_KEYS)})
    found.update(dict.fromkeys(classifier.parameters(), HEAD))
    return found


def param_groups(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    adaptive_lr_scale: float = 1.0,
    backbone_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Timm's parameter groups for layer decay, each divided by role.

    Without ``lr`` a group has an ``lr_scale``, by which timm's schedulers multiply its rate; with it, for PyTorch's own
    schedulers, its rate.

    Args:
        model: an APViT, or a ViT of timm.
        lr: learning rate of the classifier.
        weight_decay: of weights; biases, norms and embeddings have none.
        layer_decay: factor of the rate from a block to the one below.
        adaptive_lr_scale: factor on the rate of the adaptive layers.
        backbone_lr_scale: factor on the rate of the backbone, besides the layer decay.

    Example:
        >>> import timm, timm_apvit, torch
        >>> model = timm.create_model('test_apvit', num_classes=2)
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=2e-4, layer_decay=0.75))
        >>> sorted({round(group['lr'] / 2e-4, 3) for group in optimizer.param_groups})[-1]
        1.0
    """
    common: dict[str, Any] = {
        'weight_decay': weight_decay,
        'no_weight_decay_list': getattr(model, 'no_weight_decay', set)(),
    }
    if layer_decay == 1:
        by_layer = param_groups_weight_decay(model, **common)
    else:
        by_layer = param_groups_layer_decay(model, layer_decay=layer_decay, **common)
    role_of = roles(model)
    groups = []
    for group in by_layer:
        for role, factor in ((ADAPTIVE, adaptive_lr_scale), (BACKBONE, backbone_lr_scale), (HEAD, 1.0)):
            if parameters := [p for p in group['params'] if role_of[p] == role]:
                scale = group.get('lr_scale', 1.0) * factor
                rate = {'lr_scale': scale} if lr is None else {'lr': lr * scale}
                groups.append({**{k: v for k, v in group.items() if k != 'lr_scale'}, 'params': parameters, **rate})
    return groups


def freeze(model: nn.Module, frozen: Collection[str]) -> bool:
    """Freeze the parameters of these roles and free all others; tell whether that changed anything."""
    changed = [p for p, role in roles(model).items() if p.requires_grad == (role in frozen)]
    for parameter in changed:
        parameter.requires_grad_(not parameter.requires_grad)
    return bool(changed)
