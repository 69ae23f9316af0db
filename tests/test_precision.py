"""Half precision and autocast: patches stay where they lie, and logits err no more than the ViT's own."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import move_patches, randomise
from torch import Tensor, nn

from timm_apvit import TRANSFORMS

HALF = [torch.bfloat16, torch.float16]
KWARGS = {'img_size': 96, 'num_classes': 100}
LIMIT = 1.2
CAST_LIMIT = 1.3  # in float16 1.23, as the weights that say where patches lie are rounded too


@pytest.fixture(scope='module')
def vit():
    return randomise(timm.create_model('test_vit', **KWARGS)).eval()


@pytest.fixture(scope='module')
def inputs(photographs) -> dict[str, Tensor]:
    """Crops of photographs, and noise, in which no two pixels are alike."""
    crops = [p[..., y : y + 256, x : x + 256] for p in photographs for y, x in ((0, 0), (40, 60))]
    crops = [F.interpolate(crop, (96, 96), mode='bicubic', antialias=True) for crop in crops]
    return {'photographs': torch.cat(crops) * 4 - 2, 'noise': torch.randn(8, 3, 96, 96)}


def adaptive(vit, transform, **kwargs) -> nn.Module:
    """An APViT of a ViT's weights whose patches move, zoom, turn and bend."""
    model = timm.create_model('test_apvit', transform=transform, **KWARGS, **kwargs).eval()
    model.load_state_dict(vit.state_dict())
    return move_patches(model, std=0.3)


def logits(model, image, dtype=torch.float32, autocast=False) -> Tensor:
    """Of a copy of the model in a dtype, or of the model under autocast to it."""
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype if autocast else None, enabled=autocast):
        return (model(image) if autocast else copy.deepcopy(model).to(dtype)(image.to(dtype))).float()


def error(model, image, dtype, autocast) -> float:
    """Of the logits against those in float32, in standard deviations of these (of each image)."""
    exact = logits(model, image)
    difference = (logits(model, image, dtype, autocast) - exact).square().mean().sqrt()
    return (difference / exact.std(dim=1).square().mean().sqrt()).item()


# A cast rounds the localisation network's weights too: what this does to patches of noise no later care can mend.
@pytest.mark.parametrize(('autocast', 'what'), [(False, 'photographs'), (True, 'photographs'), (True, 'noise')])
@pytest.mark.parametrize('dtype', HALF)
def test_logits_of_every_family_err_no_more_than_the_vits(vit, inputs, dtype, autocast, what):
    own = error(vit, inputs[what], dtype, autocast)
    ratios = {name: error(adaptive(vit, name), inputs[what], dtype, autocast) / own for name in TRANSFORMS}
    assert max(ratios.values()) <= (LIMIT if autocast else CAST_LIMIT), ratios


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_a_cast_model_may_keep_its_patching_in_float32(vit, inputs, transform):
    model, image = adaptive(vit, transform), inputs['noise']
    cast = copy.deepcopy(model).bfloat16()
    cast.patch_embed.patching = model.patch_embed.patching
    exact, own = logits(model, image), error(vit, image, torch.bfloat16, autocast=False)
    with torch.no_grad():
        difference = (cast(image.bfloat16()) - exact).square().mean().sqrt()
    assert difference / exact.std(dim=1).square().mean().sqrt() <= LIMIT * own


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_geometry_is_that_of_the_weights_in_float32(vit, transform, dtype):
    model, image = adaptive(vit, transform), torch.randn(2, 3, 96, 96)
    expected = model.patch_geometry(image)
    with torch.autocast('cpu', dtype=dtype):
        assert_same_geometry(model.patch_geometry(image), expected, tolerance=0)
    cast = model.to(dtype)
    moved = cast.patch_geometry(image.to(dtype))
    assert_same_geometry(moved, cast.float().patch_geometry(image.to(dtype).float()), tolerance=1e-6)


def assert_same_geometry(actual, expected, tolerance):
    for name in expected._fields:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        if theirs is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('localizer', ['cnn', 'glance', 'saliency'])
def test_every_parameter_learns(vit, dtype, autocast, localizer):
    model, image = adaptive(vit, 'tps', localizer=localizer).train(), torch.randn(2, 3, 96, 96)
    if not autocast:
        model, image = model.to(dtype), image.to(dtype)
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        loss = model(image).square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {next(model.parameters()).dtype}
