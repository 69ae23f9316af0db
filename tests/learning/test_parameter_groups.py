"""What learns at what rate, and what is frozen when."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tiny import tiny_model

from timm_apvit.finetuning.baseline import create_baseline
from timm_apvit.learning.parameter_groups import ADAPTIVE, BACKBONE, HEAD, freeze, param_groups, roles

LR = 1e-3
CHANGES = {'adaptive_lr_scale': 0.3, 'backbone_lr_scale': 0.1}


def rates(model: torch.nn.Module, **changes: float) -> dict[str, float]:
    """The rate of each parameter at its peak, by timm's schedules and as PyTorch's have it."""
    optimizer = create_optimizer_v2(model, 'adamw', lr=LR, param_group_fn=lambda each: param_groups(each, **changes))
    create_scheduler_v2(optimizer, num_epochs=2, step_on_epochs=False, updates_per_epoch=10)[0].step_update(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert found.keys() == set(names.values())
    plain = torch.optim.AdamW(param_groups(model, lr=LR, **changes))
    assert {names[p]: group['lr'] for group in plain.param_groups for p in group['params']} == pytest.approx(found)
    return found


def test_roles() -> None:
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_role = {
        role: {names[p] for p, own in roles(model).items() if own == role} for role in (ADAPTIVE, HEAD, BACKBONE)
    }
    assert by_role[HEAD] == {'head.weight', 'head.bias'}
    vit = {name for name, _ in create_baseline(model).named_parameters()}
    assert by_role[BACKBONE] == vit - by_role[HEAD]
    assert by_role[ADAPTIVE] == set(names.values()) - vit
    assert {'pos_embed', 'cls_token', 'patch_embed.proj.weight'} <= by_role[BACKBONE]


@pytest.mark.parametrize('layer_decay', [1.0, 0.5])
def test_multipliers_come_on_top_of_layer_decay(layer_decay: float) -> None:
    plain = rates(tiny_model(), layer_decay=layer_decay)
    scaled = rates(tiny_model(), layer_decay=layer_decay, **CHANGES)
    factors = {name: scaled[name] / plain[name] for name in plain}
    assert factors['head.weight'] == factors['head.bias'] == pytest.approx(1)
    assert factors['blocks.0.mlp.fc1.weight'] == factors['pos_embed'] == pytest.approx(0.1)
    adaptive = [value for name, value in factors.items() if 'localizer' in name or 'geometry_embed' in name]
    assert len(adaptive) > 5
    assert adaptive == pytest.approx([0.3] * len(adaptive))
    assert plain['blocks.0.mlp.fc1.weight'] / plain['blocks.1.mlp.fc1.weight'] == pytest.approx(layer_decay)
    assert plain['patch_embed.geometry_embed.weight'] == pytest.approx(LR)


def test_norms_and_embeddings_do_not_decay() -> None:
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group['weight_decay'] for group in param_groups(model) for p in group['params']}
    assert decay['blocks.0.mlp.fc1.weight'] == 0.05
    assert decay['pos_embed'] == decay['cls_token'] == decay['blocks.0.norm1.weight'] == decay['head.bias'] == 0


def test_roles_are_frozen_and_freed() -> None:
    model = tiny_model()
    freeze(model, (BACKBONE, ADAPTIVE))
    assert {role for p, role in roles(model).items() if p.requires_grad} == {HEAD}
    freeze(model, (BACKBONE,))
    assert {role for p, role in roles(model).items() if p.requires_grad} == {HEAD, ADAPTIVE}
    freeze(model, ())
    assert all(p.requires_grad for p in model.parameters())
