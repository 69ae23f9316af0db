"""What learns at what rate, and what is frozen when."""

import pytest
import torch
from tiny import SCHEDULE, tiny_model

from timm_apvit.finetuning.optimization import (
    BACKBONE,
    HEAD,
    LOCALIZER,
    create_optimizer,
    create_scheduler,
    freeze,
    learning_rate,
    roles,
)
from timm_apvit.finetuning.twin import create_twin

CHANGES = {'localizer_lr_scale': 0.3, 'backbone_lr_scale': 0.1}


def rates(model: torch.nn.Module, **changes: float) -> dict[str, float]:
    """The rate of each parameter at its peak."""
    schedule = SCHEDULE._replace(**changes)
    optimizer = create_optimizer(model, schedule)
    create_scheduler(optimizer, schedule, 10).step_update(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert found.keys() == set(names.values())
    assert learning_rate(optimizer) == pytest.approx(schedule.lr)
    return found


def test_roles() -> None:
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_role = {
        role: {names[p] for p, own in roles(model).items() if own == role} for role in (LOCALIZER, HEAD, BACKBONE)
    }
    assert by_role[HEAD] == {'head.weight', 'head.bias'}
    vit = {name for name, _ in create_twin(model).named_parameters()}
    assert by_role[BACKBONE] == vit - by_role[HEAD]
    assert by_role[LOCALIZER] == set(names.values()) - vit
    assert {'pos_embed', 'cls_token', 'patch_embed.proj.weight'} <= by_role[BACKBONE]


@pytest.mark.parametrize('layer_decay', [1.0, 0.5])
def test_multipliers_come_on_top_of_layer_decay(layer_decay: float) -> None:
    plain, scaled = (
        rates(tiny_model(), layer_decay=layer_decay),
        rates(tiny_model(), layer_decay=layer_decay, **CHANGES),
    )
    factors = {name: scaled[name] / plain[name] for name in plain}
    assert factors['head.weight'] == factors['head.bias'] == pytest.approx(1)
    assert factors['blocks.0.mlp.fc1.weight'] == factors['pos_embed'] == pytest.approx(0.1)
    localizer = [value for name, value in factors.items() if 'localizer' in name or 'geometry_embed' in name]
    assert len(localizer) > 5
    assert localizer == pytest.approx([0.3] * len(localizer))
    assert plain['blocks.0.mlp.fc1.weight'] / plain['blocks.1.mlp.fc1.weight'] == pytest.approx(layer_decay)
    assert plain['patch_embed.geometry_embed.weight'] == pytest.approx(SCHEDULE.lr)


def test_norms_and_embeddings_do_not_decay() -> None:
    model = tiny_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: g['weight_decay'] for g in create_optimizer(model, SCHEDULE).param_groups for p in g['params']}
    assert decay['blocks.0.mlp.fc1.weight'] == SCHEDULE.weight_decay
    assert decay['pos_embed'] == decay['cls_token'] == decay['blocks.0.norm1.weight'] == decay['head.bias'] == 0


def test_parts_are_frozen_in_their_first_epochs() -> None:
    model = tiny_model()
    schedule = SCHEDULE._replace(epochs=4, freeze_backbone_epochs=2, freeze_localizer_epochs=1)
    learning = []
    for epoch in range(4):
        learning.append((freeze(model, schedule, epoch), {role for p, role in roles(model).items() if p.requires_grad}))
    everything = {HEAD, LOCALIZER, BACKBONE}
    assert learning == [(True, {HEAD}), (True, {HEAD, LOCALIZER}), (True, everything), (False, everything)]
