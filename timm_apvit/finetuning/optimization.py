"""What of a model learns, and how fast."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_apvit.finetuning.schedule import Schedule
from timm_apvit.models.checkpoint import ADAPTIVE_KEYS

LOCALIZER, BACKBONE, HEAD = 'localizer', 'backbone', 'head'


def roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """What each parameter is part of: what a ViT does not have, the classifier, or the backbone."""
    classifier: nn.Module = getattr(model, 'get_classifier')()  # noqa: B009  of every timm model
    found = dict.fromkeys(model.parameters(), BACKBONE)
    found.update({p: LOCALIZER for name, p in model.named_parameters() if name.startswith(ADAPTIVE_KEYS)})
    found.update(dict.fromkeys(classifier.parameters(), HEAD))
    return found


def create_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW over timm's groups for layer decay, each divided by role, whose rates the schedule scales."""
    role_of = roles(model)
    role_scale = {LOCALIZER: schedule.localizer_lr_scale, BACKBONE: schedule.backbone_lr_scale, HEAD: 1.0}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        common: dict[str, Any] = {
            'weight_decay': schedule.weight_decay,
            'no_weight_decay_list': getattr(model, 'no_weight_decay', set)(),
        }
        if schedule.layer_decay == 1:
            by_layer = param_groups_weight_decay(model, **common)
        else:
            by_layer = param_groups_layer_decay(model, layer_decay=schedule.layer_decay, **common)
        divided = []
        for group in by_layer:
            for role, scale in role_scale.items():
                if parameters := [p for p in group['params'] if role_of[p] == role]:
                    lr_scale = group.get('lr_scale', 1.0) * scale
                    divided.append({**group, 'params': parameters, 'lr_scale': lr_scale})
        return divided

    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model, opt='adamw', lr=schedule.lr, weight_decay=schedule.weight_decay, param_group_fn=groups
    )
    return optimizer


def create_scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, updates_per_epoch: int) -> Any:
    """A linear rise and a cosine fall of the learning rate, update by update."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=schedule.epochs,
        warmup_epochs=schedule.warmup,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate before any group scales it."""
    group = optimizer.param_groups[0]
    return float(group['lr'] / group['lr_scale'])


def freeze(model: nn.Module, schedule: Schedule, epoch: int) -> bool:
    """Freeze what does not learn in an epoch and free the rest; tell whether that changed anything."""
    frozen = {
        LOCALIZER: epoch < schedule.freeze_localizer_epochs,
        BACKBONE: epoch < schedule.freeze_backbone_epochs,
        HEAD: False,
    }
    changed = False
    for parameter, role in roles(model).items():
        if parameter.requires_grad == frozen[role]:
            parameter.requires_grad_(not frozen[role])
            changed = True
    return changed
