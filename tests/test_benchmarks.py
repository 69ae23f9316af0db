"""The benchmark's contestants and images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
sys.path.insert(0, str(BENCHMARKS))

from contestants import CONTESTANTS, VARIANTS, create_contestant  # noqa: E402
from fashion import CleanObjects, Crops, load_fashion  # noqa: E402

from timm_apvit.finetuning.clutter import Clutter, ClutteredObjects  # noqa: E402


@pytest.mark.parametrize('name', CONTESTANTS)
def test_contestants_take_the_same_images_at_the_same_budget(name):
    model = create_contestant(name, 112, 16, None).eval()
    image = torch.rand(2, 1, 112, 112)
    logits = model(image)
    assert logits.shape == (2, 10)
    assert torch.equal(model(image), logits)  # tests are repeatable, by chance or not
    if name not in ('fixed', 'object'):
        assert model.num_patches == 16


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_lack_what_they_say(variant):
    torch.manual_seed(0)
    model = create_contestant('adaptive', 112, 16, None, variant)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    image = torch.rand(1, 1, 112, 112)
    geometry = model.patch_geometry(image)
    patching = model.patch_embed.patching
    logits = model.eval()(image)
    assert logits.shape == (1, 10)
    if variant == 'no-pyramid':
        # A patch covers 28 pixels with 16 samples: what lies between them is not seen.
        assert patching.transform.max_footprint(patching.layout, (112, 112), (16, 16)) == 1
    elif variant == 'no-context':
        far = image.clone()
        far[..., 64:, 64:] = 0
        # Group norm alone knows of the rest of the image.
        assert torch.allclose(model.patch_geometry(far).centres[:, 0], geometry.centres[:, 0], atol=2e-3)
    elif variant == 'no-geometry':
        assert not any('geometry_embed' in name for name, _ in model.named_parameters())
    else:
        usual = create_contestant('adaptive', 112, 16, None).patch_embed.patching.localizer
        localizer = patching.localizer
        assert (localizer.side, localizer.width) != (usual.side, usual.width)


def test_patches_by_chance_lie_elsewhere_in_every_training_image():
    model = create_contestant('random', 112, 16, None).train()
    centres = model.patch_geometry(torch.rand(1, 1, 112, 112).expand(2, -1, -1, -1)).centres
    assert (centres[0] - centres[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({}, 'square number'),
        ({'max_focus': 2.0}, 'adaptive patches only'),
        ({'variant': 'no-context'}, 'adaptive patches only'),
    ],
)
def test_rejects_unfair_contestants(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_contestant('fixed', 112, 16 if kwargs else 20, None, **kwargs)


def objects(**kwargs):
    images = np.random.default_rng(0).random((5, 28, 28)).astype(np.float32)
    clutter = Clutter(sides=(0.3, 0.3), pieces=0)
    return ClutteredObjects(images, np.arange(5), 6, 0, (1, 40, 40), (0.0,), (1.0,), clutter)


def test_crops_are_the_objects_own_boxes():
    source = objects()
    canvas, label, (y, x, side) = source.compose(2)
    crop, same_label = Crops(source, side)[2]
    assert same_label == label
    assert torch.allclose(crop[0], torch.from_numpy(canvas[y : y + side, x : x + side]), atol=1e-6)
    outside = canvas.copy()
    outside[y : y + side, x : x + side] = 0
    assert not outside.any()


def test_clean_objects_fill_the_canvas():
    source = objects()
    clean = CleanObjects(source.objects, source.labels, 6, 0, (1, 28, 28), (0.0,), (1.0,))
    image, label = clean[3]
    assert torch.allclose(image[0], torch.from_numpy(source.objects[label]), atol=1e-6)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'expected train-images-idx3-ubyte\.gz in'):
        load_fashion(tmp_path, train=True)
