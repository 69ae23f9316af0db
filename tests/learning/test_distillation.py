"""Distillation: what is observed, where attention goes, and what the losses draw."""

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import learn, randomise
from tiny import a_batch, tiny_learner, tiny_model
from torch import nn

from timm_apvit.learning.distillation import (
    DistillationTask,
    DistillationWeights,
    Outputs,
    Teacher,
    distillation_losses,
    outputs_of,
    patch_density,
)
from timm_apvit.models.attention import patch_attention
from timm_apvit.patching.geometry import PatchGeometry

NOTHING = DistillationWeights(logits=0.0, temperature=1.0, token=0.0, attention=0.0)


def a_teacher(model: nn.Module) -> Teacher:
    return Teacher(model)


def square_patches(centres: torch.Tensor, half_extent: float) -> PatchGeometry:
    """Upright patches around centres ``(B, N, 2)``."""
    flat = torch.zeros(centres.shape[:2])
    return PatchGeometry(
        centres=centres,
        extents=torch.full_like(centres, half_extent),
        rotation=flat,
        shear=flat,
        image_from_patch=half_extent * torch.eye(2).expand(*centres.shape[:2], 2, 2),
    )


# One that reads all blocks of the ViT, before the ViT itself does.
GLANCE = {'name': 'glance', 'grid': 3, 'blocks': 2}


@pytest.mark.parametrize(
    'pool', [{'global_pool': 'token'}, {'global_pool': 'avg', 'class_token': False}, {'localizer': GLANCE}]
)
def test_outputs_are_what_timm_computes_and_leaves_nothing_behind(pool: dict[str, Any]) -> None:
    model, (images, _) = tiny_model(**pool).eval(), a_batch(2)
    before = set(vars(model.patch_embed)), len(model.patch_embed._forward_hooks), len(model.head._forward_pre_hooks)
    outputs = outputs_of(model, images)
    after = set(vars(model.patch_embed)), len(model.patch_embed._forward_hooks), len(model.head._forward_pre_hooks)
    assert before == after
    assert torch.equal(outputs.logits, model(images))
    assert torch.equal(outputs.features, model.forward_head(model.forward_features(images), pre_logits=True))
    assert outputs.geometry is not None
    assert torch.equal(outputs.geometry.centres, model.patch_geometry(images).centres)


@pytest.mark.parametrize(
    'kwargs', [{}, {'reg_tokens': 2, 'qk_norm': True}, {'class_token': False, 'global_pool': 'avg', 'reg_tokens': 1}]
)
def test_attention_is_that_of_timms_unfused_layer(kwargs: dict[str, Any]) -> None:
    model: Any = randomise(timm.create_model('test_vit', img_size=48, **kwargs)).eval()
    layer = model.blocks[-1].attn
    layer.fused_attn = False
    seen: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    layer.attn_drop.register_forward_hook(lambda _, args, output: seen.append(output))
    layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model(torch.randn(2, 3, 48, 48))
    queries = slice(0, 1) if model.has_class_token else slice(model.num_prefix_tokens, None)
    expected = seen[0][:, :, queries, model.num_prefix_tokens :].mean(dim=(1, 2))
    expected = expected / expected.sum(dim=1, keepdim=True)
    assert expected.shape == (2, 9)
    torch.testing.assert_close(patch_attention(model, layer, tokens[0]), expected)


def test_adaptive_teacher_on_its_full_grid_attends_like_the_vit() -> None:
    vit: Any = randomise(timm.create_model('test_vit', img_size=64)).eval()
    adaptive: Any = timm.create_model('test_apvit', img_size=64).eval()
    adaptive.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 64, 64)
    expected, taught = (a_teacher(model)(images, attention=True) for model in (vit, adaptive))
    assert expected.grid == taught.grid == (4, 4)
    assert expected.attention is not None
    assert expected.attention.std() > 1e-3
    torch.testing.assert_close(taught.attention, expected.attention, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(taught.logits, expected.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('localizer', ['cnn', GLANCE])
def test_moved_patches_of_a_teacher_carry_their_attention_along(localizer: Any) -> None:
    taught = a_teacher(tiny_model(num_patches=3, localizer=localizer))(a_batch(2)[0], attention=True)
    assert taught.attention is not None
    assert taught.attention.shape == (2, 4)
    torch.testing.assert_close(taught.attention.sum(dim=1), torch.ones(2))


def test_convention_density_is_over_cells_in_rows() -> None:
    # One small patch in the cell of row 0 and column 2 of a grid of 2 x 3.
    geometry = square_patches(torch.tensor([[[2 / 3, -0.5]]]), 0.1)
    density = patch_density(geometry, (2, 3))
    assert density.shape == (1, 6)
    assert density.argmax() == 2
    assert density[0, 2] > 0.999
    spread = patch_density(square_patches(torch.randn(2, 5, 2).clamp(-0.8, 0.8), 0.3), (4, 3))
    torch.testing.assert_close(spread.sum(dim=1), torch.ones(2))


def test_attention_draws_patches_to_where_it_is() -> None:
    centres = torch.tensor([[[-0.6, -0.5], [-0.4, 0.5]]], requires_grad=True)
    attention = torch.zeros(1, 16)
    attention[0, [3, 7]] = 0.5  # the upper right corner
    optimizer = torch.optim.Adam([centres], lr=0.05)
    taught = Outputs(torch.zeros(1, 2), torch.zeros(1, 2), None, attention, (4, 4))

    def loss():
        outputs = Outputs(torch.zeros(1, 2), torch.zeros(1, 2), square_patches(centres, 0.25))
        return distillation_losses(outputs, taught, NOTHING._replace(attention=1.0))['attention_loss']

    losses = learn(optimizer, 100, loss)
    assert losses[-1] < losses[0] / 3
    assert centres[0, :, 0].min() > 0.5
    assert centres[0, :, 1].max() < 0.1


@pytest.mark.parametrize('localizer', ['cnn', GLANCE])
def test_loss_of_the_attention_reaches_the_localiser_alone(localizer: Any) -> None:
    model = tiny_model(localizer=localizer).train()
    outputs = outputs_of(model, a_batch(2)[0])
    taught = Outputs(outputs.logits, outputs.features, None, torch.tensor([[1.0, 0, 0, 0]] * 2), (2, 2))
    distillation_losses(outputs, taught, NOTHING._replace(attention=1.0))['attention_loss'].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached
    assert all('.localizer.' in name for name in reached)
    assert max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None) > 1e-4


def test_losses_are_those_of_their_definitions() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    features, target = torch.randn(4, 7), torch.randn(4, 7)
    outputs, taught = Outputs(student, features), Outputs(teacher, target)
    probability = F.softmax(teacher / 2, dim=1)
    divergence = (probability * (probability.log() - F.log_softmax(student / 2, dim=1))).sum(dim=1).mean() * 4
    terms = distillation_losses(outputs, taught, NOTHING._replace(logits=0.25, temperature=2.0, token=2.0))
    cosine = F.normalize(features, dim=1).mul(F.normalize(target, dim=1)).sum(dim=1)
    torch.testing.assert_close(terms, {'logit_loss': divergence, 'token_loss': (1 - cosine).mean()})
    same = Outputs(student, features)
    terms = distillation_losses(outputs, same, NOTHING._replace(logits=1.0, token=1.0))
    torch.testing.assert_close(sum(terms.values()), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_objective_weighs_its_terms() -> None:
    model, (images, labels) = tiny_model(), a_batch(4)
    weights = DistillationWeights(logits=0.25, temperature=1.0, token=2.0, attention=0.5)
    task = DistillationTask(model, a_teacher(tiny_model(num_patches=3)), weights, verbose=False).train()
    assert not task.teacher.model.training
    result = task(images, labels)
    torch.testing.assert_close(result['label_loss'], F.cross_entropy(result['output'], labels))
    factors = {'label_loss': 0.75, 'logit_loss': 0.25, 'token_loss': 2.0, 'attention_loss': 0.5}
    expected = sum(factor * result[name] for name, factor in factors.items())
    torch.testing.assert_close(result['loss'], expected)


@pytest.mark.parametrize('amp', [None, 'bfloat16'])
def test_update_learns_from_the_teacher_and_leaves_it_as_it_is(amp: str | None) -> None:
    model = tiny_model()
    teacher = a_teacher(deepcopy(model))
    before = deepcopy(teacher.state_dict())
    weights = DistillationWeights(logits=0.5, temperature=1.0, token=1.0, attention=0.1)
    plain, taught = (tiny_learner(tiny_model(), amp=amp, teacher=each) for each in (None, (teacher, weights)))
    losses = [learner.update([a_batch(4)], 0)['loss'] for learner in (plain, taught)]
    assert losses[0] != losses[1]
    assert losses[1].isfinite()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(plain.model.head.weight, taught.model.head.weight)


def test_images_become_those_of_the_teacher() -> None:
    seen: list[torch.Tensor] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return self.fc(images.mean(dim=(2, 3)))

    teacher = Teacher(Model(), (8, 6), [2.0, 1.0, 1.0], [0.5, 0.0, -1.0])
    taught = teacher(torch.ones(2, 3, 16, 12), attention=False)
    assert seen[0].shape == (2, 3, 8, 6)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([2.5, 1.0, 0.0]))
    assert taught.features.shape == (2, 3)
    assert not taught.logits.requires_grad
