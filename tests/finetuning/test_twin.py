"""The fixed-grid twin is the same ViT with as many tokens."""

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import run

import timm_apvit
from timm_apvit.finetuning.baseline import create_baseline, fixed_grid


def make(**kwargs: object) -> timm_apvit.APViT:
    torch.manual_seed(0)
    model = timm.create_model('test_apvit', num_classes=5, **kwargs)
    assert isinstance(model, timm_apvit.APViT)
    torch.nn.init.normal_(model.pos_embed)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_twin_of_a_new_model_at_the_full_grid_is_that_model() -> None:
    model = make(img_size=64, class_token=False, global_pool='avg')
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(create_baseline(model).eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_twin_sees_the_image_made_smaller() -> None:
    model = make(img_size=(64, 96), patch_size=8, num_patches=(2, 4), max_shift=0.5, drop_path_rate=0.2)
    twin = create_baseline(model).eval()
    assert not isinstance(twin, timm_apvit.APViT)
    assert twin.patch_embed.img_size == (16, 32)
    assert twin.patch_embed.num_patches == 8
    assert twin.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    images = torch.randn(2, 3, 64, 96)
    smaller = F.interpolate(images, (16, 32), mode='bilinear', antialias=True)
    assert torch.equal(twin(images), twin(smaller))
    assert torch.equal(twin.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_twin_shares_no_storage_with_the_model() -> None:
    model = make(img_size=64)
    twin = create_baseline(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in (model.pos_embed, model.head.weight, model.cls_token))


@pytest.mark.parametrize(
    ('num_patches', 'expected'),
    [((2, 3), (2, 3)), (None, (4, 4)), (16, (4, 4)), (8, (2, 4)), (7, (2, 4)), (5, (2, 3)), (1, (1, 1)), (2, (1, 2))],
)
def test_grid_has_at_least_as_many_cells(num_patches: object, expected: tuple[int, int]) -> None:
    model = make(img_size=64, num_patches=num_patches)
    grid = fixed_grid(model)
    assert sorted(grid) == sorted(expected)
    assert grid[0] * grid[1] >= model.num_patches


@pytest.mark.parametrize('number', [11, 13, 97, 101])
def test_grid_of_a_prime_is_near_to_it_and_not_elongated(number: int) -> None:
    gh, gw = fixed_grid(make(img_size=(64, 128), num_patches=number))
    assert number <= gh * gw <= 1.2 * number
    assert 0.99 <= gw / gh <= 4.01


def test_grey_fixed_grid_is_saved_without_a_word_of_its_channels(tmp_path, caplog):
    assert run(tmp_path / 'run', '--twin', '--epochs', '1', '--model-kwargs', 'in_chans=1', 'depth=1') == 0
    assert not [message for message in caplog.messages if 'match 1 channels' in message]
    config = timm.create_model(f'local-dir:{tmp_path / "run/twin/best"}', pretrained=True).pretrained_cfg
    assert len(config['mean']) == len(config['std']) == config['input_size'][0] == 1
