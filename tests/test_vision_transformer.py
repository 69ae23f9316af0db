"""APViT: budgets, sizes, gradients, independence, bad input."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from conftest import create
from torch import nn

import timm_apvit
from timm_apvit.patching.anchors import Rows

BUDGETS = [1, 2, 7, 49, 97, 98, 196, 400]
SIZES = [(97, 211), (224, 224), (512, 384), (1024, 1024), (1, 1)]


@pytest.mark.parametrize('num', [*BUDGETS, (5, 9)])
def test_one_state_dict_serves_every_budget_and_size(num):
    state = create(dynamic_img_size=False, img_size=224, num_classes=10).state_dict()
    model = timm.create_model(
        'test_apvit', dynamic_img_size=False, img_size=224, num_classes=10, num_patches=num
    ).eval()
    model.load_state_dict(state)
    count = num if isinstance(num, int) else 45
    assert model.num_patches == count
    for size in SIZES:
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert model(image).isfinite().all()
        assert model.patch_geometry(image).centres.shape == (2, count, 2)


@pytest.mark.parametrize('size', SIZES)
def test_dynamic_img_size_takes_any_image(size):
    model = create()
    grid = max(1, size[0] // 16), max(1, size[1] // 16)
    assert model.patch_geometry(torch.randn(1, 3, *size)).centres.shape[1] == grid[0] * grid[1]
    model.set_num_patches(9)  # a set number wins
    assert model.patch_geometry(torch.randn(1, 3, *size)).centres.shape[1] == 9
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_set_num_patches_equals_creation_and_goes_back():
    model = create(dynamic_img_size=False)
    other = timm.create_model('test_apvit', dynamic_img_size=False, num_patches=[4, 6]).eval()
    other.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 160, 160)
    before = model(image)
    model.set_num_patches((4, 6))
    torch.testing.assert_close(model(image), other(image), rtol=0, atol=0)
    model.set_num_patches(None)
    torch.testing.assert_close(model(image), before, rtol=0, atol=0)


def test_same_count_in_another_shape_reads_the_same_places():
    """The embedding of a 4 x 16 grid holds its coordinates; an 8 x 8 grid of as many patches reads its own."""
    model = timm.create_model('test_apvit', dynamic_img_size=False, img_size=(64, 256), num_patches=(8, 8))
    centres = Rows(64, 4).anchors(torch.device('cpu')).centres
    with torch.no_grad():
        model.pos_embed.zero_()[0, 1:, :2] = centres
        tokens = model.patch_embed(torch.zeros(1, 3, 64, 256))
        model.cls_token.zero_()
        position = model._pos_embed(tokens._replace(tokens=torch.zeros_like(tokens.tokens)))[0, 1:, :2]
    inner = (tokens.geometry.centres[0].abs() < 0.7).all(dim=-1)
    torch.testing.assert_close(position[inner], tokens.geometry.centres[0][inner], rtol=0, atol=0.05)


def test_default_number_follows_set_input_size_until_it_is_set():
    model = create(dynamic_img_size=False)
    assert model.num_patches == 100
    model.set_input_size((96, 160))
    assert model.num_patches == 60
    model.set_num_patches(7)
    model.set_input_size((320, 320))
    assert model.num_patches == 7
    assert model.pos_embed.shape[1] == 401
    model.set_input_size(patch_size=(8, 8))
    assert model(torch.randn(1, 3, 320, 320)).isfinite().all()
    assert model.patch_embed.patching.patch_size == (8, 8)


@pytest.mark.parametrize('bad', [0, -3, 2.5, '16', (0, 4), True])
def test_rejects_bad_num_patches(bad):
    message = 'expected num_patches to be an integer >= 1 or'
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_apvit', num_patches=bad)
    model = create(dynamic_img_size=False)
    with pytest.raises(ValueError, match=message):
        model.set_num_patches(bad)
    assert model.num_patches == 100


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'transform': 'warp'}, r"expected transform to be one of translation, .*, got 'warp'"),
        ({'max_zoom': 0.5}, 'expected max_zoom'),
        ({'max_shift': -1}, 'expected max_shift'),
        ({'max_rotation': 200}, 'expected max_rotation'),
        ({'max_perspective': 1.0}, 'expected max_perspective'),
        ({'max_warp': -0.1}, 'expected max_warp'),
        ({'jitter': -1}, 'expected jitter'),
        ({'transform': ['scale']}, 'expected transform to be one of'),
        ({'patch_size': 0}, 'expected patch_size to be'),
        ({'img_size': 8}, 'expected img_size to be at least the patch size'),
    ],
)
def test_rejects_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_apvit', **kwargs)


def test_rejects_unknown_argument():
    with pytest.raises(TypeError, match='num_patchs'):
        timm.create_model('test_apvit', num_patchs=4)


@pytest.mark.parametrize('shape', [(3, 160, 160), (1, 1, 160, 160), (1, 4, 160, 160)])
def test_rejects_bad_image_shapes(shape):
    with pytest.raises(ValueError, match=r'expected an image of shape \(B, 3, H, W\), got'):
        create()(torch.randn(*shape))


def test_rejects_integer_images():
    with pytest.raises(ValueError, match=r'floating-point image, got dtype torch\.uint8'):
        create()(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))


@pytest.mark.parametrize('image', [np.zeros((1, 3, 160, 160), np.float32), 'image.jpg', None])
def test_rejects_what_is_no_tensor(image):
    model = create()
    for call in (model, model.patch_geometry):
        with pytest.raises(TypeError, match=r'expected images as a tensor \(B, C, H, W\), got '):
            call(image)


def test_img_size_is_a_count_or_two():
    assert timm.create_model('test_apvit', img_size=np.int64(32)).patch_embed.img_size == (32, 32)
    for size in ('224', 224.5, (224,), True, (32, 0)):
        with pytest.raises(ValueError, match='expected img_size to be an integer >= 1 or'):
            timm.create_model('test_apvit', img_size=size)


def test_a_slip_of_an_argument_names_the_nearest():
    with pytest.raises(TypeError, match="got 'max_shfit': did you mean max_shift"):
        timm.create_model('test_apvit', max_shfit=1.0)


def test_empty_batch_gives_an_empty_result():
    model = create(num_classes=7, num_patches=5)
    assert model(torch.zeros(0, 3, 160, 160)).shape == (0, 7)


@pytest.mark.parametrize('transform', timm_apvit.TRANSFORMS)
def test_every_parameter_gets_a_gradient_after_one_step(transform):
    model = timm.create_model('test_apvit', transform=transform, num_classes=5)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    image, target = torch.randn(4, 3, 160, 160), torch.arange(4)
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(image), target).backward()
        optimiser.step()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0] == []


def test_results_do_not_depend_on_the_batch():
    model, image = create(num_patches=20), torch.randn(4, 3, 100, 150)
    together = model(image)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(model(image[order]), together[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(image[2:3]), together[2:3], rtol=0, atol=1e-5)


def test_threads_agree_with_one():
    model, images = create(), torch.randn(8, 1, 3, 96, 128)
    with torch.no_grad():
        alone = [model(image) for image in images]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(torch.no_grad()(model), images))
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_train_mode_with_jitter_is_random_and_eval_is_not():
    model, image = create(jitter=0.5), torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(image), model(image))


def test_an_image_that_is_not_a_number_gives_no_number_and_does_not_end_the_process():
    model = create().train()
    logits = model(torch.full((2, 3, 160, 160), float('nan')))
    assert logits.isnan().all()
    logits.sum().backward()
