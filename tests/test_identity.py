"""A new APViT is the ViT that it was made from; and fewer patches are the ViT on a smaller image."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise, relative, vit_and_apvit

import timm_apvit

LIMIT = 1e-4  # of the standard deviation of the features


def features(model, image, train=False):
    """Features without gradients, in train mode if asked for (nothing here is stochastic by default)."""
    model.train(train)
    with torch.no_grad():
        return model.forward_features(image)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', ['test_apvit', 'apvit_tiny', 'apvit_small'])
def test_features_are_the_vits(name, train):
    vit, model = vit_and_apvit(timm_apvit.vit_name(name), name, num_classes=10)
    image = torch.randn(2, 3, *vit.patch_embed.img_size)
    expected = features(vit, image, train)
    assert relative(features(model, image, train) - expected, expected) <= LIMIT
    assert relative(model(image) - vit(image), vit(image)) <= LIMIT


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', ['test_apvit', 'apvit_tiny'])
def test_features_are_the_vits_after_set_input_size(name, train):
    vit, model = vit_and_apvit(timm_apvit.vit_name(name), name)
    image = torch.randn(2, 3, 160, 224)
    for each in (vit, model):
        each.set_input_size((160, 224))
    assert model.num_patches == 140
    expected = features(vit, image, train)
    assert relative(features(model, image, train) - expected, expected) <= LIMIT


@pytest.mark.parametrize('size', [100, (97, 163)])
def test_an_image_that_the_grid_does_not_divide_loses_its_rest_as_in_timm(size):
    vit, model = vit_and_apvit('test_vit', 'test_apvit', img_size=size, dynamic_img_size=False)
    image = torch.randn(1, 3, *vit.patch_embed.img_size)
    expected = features(vit, image)
    assert relative(features(model, image) - expected, expected) <= LIMIT
    corners = (model.patch_geometry(image).outlines()[0] + 1) / 2 * torch.tensor(image.shape[:1:-1])
    torch.testing.assert_close(corners[0, 2], torch.tensor([16.0, 16.0]))
    model.set_num_patches(model.num_patches)  # set by hand, they tile the whole image
    torch.testing.assert_close(model.patch_geometry(image).outlines()[0, -1, 2], torch.ones(2))


@pytest.mark.parametrize('transform', timm_apvit.TRANSFORMS)
def test_every_family_starts_as_the_vit(transform):
    vit = randomise(timm.create_model('test_vit')).eval()
    model = timm.create_model('test_apvit', transform=transform, max_zoom=4.0).eval()
    model.load_state_dict(vit.state_dict())
    image = torch.randn(2, 3, 160, 160)
    assert relative(model(image) - vit(image), vit(image)) <= LIMIT


@pytest.mark.parametrize('size', [(160, 160), (96, 256), (320, 160)])
@pytest.mark.parametrize('pad', [False, True])
def test_dynamic_img_size_follows_the_input_as_in_timm(size, pad):
    vit, model = vit_and_apvit('test_vit', 'test_apvit', dynamic_img_pad=pad)
    size = (size[0] - 3, size[1] - 9) if pad else size
    image = torch.randn(1, 3, *size)
    expected = features(vit, image)
    assert relative(features(model, image) - expected, expected) <= LIMIT


def photograph(photographs, size):
    image = F.interpolate(photographs[0], size, mode='bicubic', antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (image - mean) / std


DINOV2 = ('vit_small_patch14_dinov2', 'apvit_small_patch14_dinov2')


def dinov2(name, file, **kwargs):
    overlay = {'file': file, 'custom_load': False, 'num_classes': 0, 'input_size': (3, 518, 518)}
    model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **kwargs)
    return model.eval()


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', [(224, 224), (168, 280)])
def test_features_are_the_vits_with_real_weights(dinov2_file, photographs, size, train):
    image = photograph(photographs, size)
    vit, model = (
        dinov2(n, dinov2_file, img_size=224) for n in ('vit_small_patch14_dinov2', 'apvit_small_patch14_dinov2')
    )
    if size != (224, 224):
        for each in (vit, model):
            each.set_input_size(size)
    expected = features(vit, image, train)
    assert relative(features(model, image, train) - expected, expected) <= LIMIT


@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16_is_no_further_from_the_vit_than_its_own(dinov2_file, photographs, autocast):
    image = photograph(photographs, (224, 224))
    vit, model = (
        dinov2(n, dinov2_file, img_size=224) for n in ('vit_small_patch14_dinov2', 'apvit_small_patch14_dinov2')
    )
    exact = features(vit, image)
    errors = []
    for each in (vit, model):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            given = (each, image) if autocast else (each.bfloat16(), image.bfloat16())
            errors.append((features(*given).float() - exact).square().mean().sqrt().item())
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize(('num', 'side'), [(64, 112), (16, 56)])
def test_fewer_patches_are_the_vit_on_the_area_averaged_image(dinov2_file, photographs, num, side):
    vit = dinov2('vit_small_patch14_dinov2', dinov2_file, img_size=side)
    model = dinov2('apvit_small_patch14_dinov2', dinov2_file, img_size=224, num_patches=num)
    cosines = []
    for photo in photographs:
        image = photograph([photo], (224, 224))
        small = F.avg_pool2d(image, 224 // side)
        cosines.append(F.cosine_similarity(features(vit, small)[:, 0], features(model, image)[:, 0]).item())
    assert min(cosines) >= 0.999, cosines
