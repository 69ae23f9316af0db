"""A network that says how much each place matters."""

import pytest
import timm
import torch
from conftest import CROWDING, create, randomise
from timm.optim import create_optimizer_v2

import timm_apvit


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        *(({'crowd': crowd}, r'crowd to be a finite number within \[0.1, 0.9\]') for crowd in (0, 0.95, 'all', True)),
        ({'side': 100}, 'side to be a multiple of 32, got 100'),
        ({'width': 8}, 'width to be a multiple of 16, got 8'),
        ({'width': 0}, 'width to be a multiple of 16, got 0'),
    ],
)
def test_rejects_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f'expected {message}'):
        create(localizer={'name': 'saliency', **options})


def test_what_it_reads_has_the_shape_and_not_the_size_of_the_image():
    localizer = create(localizer={'name': 'saliency', 'side': 64, 'width': 16}).patch_embed.patching.localizer
    sizes = [(64, 64), (900, 900), (100, 400), (400, 100), (1, 1), (3000, 8), (1, 10_000)]
    read = [(64, 64), (64, 64), (32, 128), (128, 32), (64, 64), (128, 32), (32, 128)]
    assert [localizer.size(each) for each in sizes] == read
    assert [localizer.level(each) for each in sizes] == [0, 3, 1, 1, 0, 0, 0]


def test_patches_crowd_in_the_corner_that_is_found_and_no_loss_but_its_own_teaches_it():
    model = randomise(create(**CROWDING, max_shift=0.5, max_zoom=1.0))
    localizer = model.patch_embed.patching.localizer
    saliency = torch.zeros(1, 12, 20)
    saliency[:, 8:, :5] = 9.0
    look = localizer.look

    def looked(pyramid):
        density = torch.softmax(saliency.flatten(1), dim=1).reshape(saliency.shape)
        return look(pyramid)._replace(density=density)

    x = torch.randn(1, 3, 96, 160)
    localizer.look = looked
    started = model.patch_geometry(x).started
    there = (started.centres[0, :, 0] < -0.5) & (started.centres[0, :, 1] > 1 / 3)
    assert there.sum() > 12  # of three of the grid
    del localizer.look
    model(x).square().mean().backward()
    assert localizer.score.weight.grad.abs().max() == localizer.stem[0][0].weight.grad.abs().max() == 0
    assert localizer.fields['shift'].weight.grad.abs().max() > 0
    # So a training without it leaves what was found, and no weight decay fades it.
    before = localizer.stem[0][0].weight.detach().clone()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(localizer.stem[0][0].weight, before)


def test_it_comes_back_for_grey_images(tmp_path):
    model = randomise(create(**CROWDING)).eval()
    timm_apvit.save_pretrained(model, tmp_path)
    grey = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1).eval()
    x = torch.randn(2, 1, 96, 96)
    expected = model.patch_geometry(x.expand(-1, 3, -1, -1)).saliency
    torch.testing.assert_close(grey.patch_geometry(x).saliency, expected, rtol=1e-4, atol=1e-4)
