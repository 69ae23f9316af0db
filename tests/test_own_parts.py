"""Localisers, layouts and families of one's own: each in a file as a user would write it (``tests/own``)."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_equal_up_to_rounding, create, images, move_patches, randomise

import timm_apvit
from timm_apvit import LAYOUTS, Layout, Localizer, register_layout, register_localizer
from timm_apvit.patching.anchors import CoarseFine, Rows, check_num_patches, resolve_layout

OWN = Path(__file__).parent / 'own'
COARSE_FINE = {'name': 'coarse_fine', 'coarse': 4, 'fine': [5, 7], 'coarse_motion': 0.0}


def run(name):
    """Import a user's file."""
    spec = importlib.util.spec_from_file_location(f'own_{name}', OWN / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def test_own_files_are_short():
    assert [path.name for path in OWN.glob('*.py') if len(path.read_text().splitlines()) >= 60] == []


ARGUMENTS = {
    'localizer': {'localizer': 'brightest'},
    'layout': {'num_patches': {'name': 'fovea', 'cells': 5}},
    'transform': {'transform': 'widening', 'max_width': 3.0, 'max_zoom': 1.5},
}


@pytest.mark.parametrize('name', ARGUMENTS)
def test_a_part_of_ones_own_is_the_vit_at_first_trains_saves_and_loads(name, tmp_path):
    run(name)
    vit = randomise(timm.create_model('test_vit')).eval()
    model = timm.create_model('test_apvit', **ARGUMENTS[name]).eval()
    model.load_state_dict(vit.state_dict())
    image = images(2, 3, 160, 160)
    if name != 'layout':
        assert_equal_up_to_rounding(model(image), vit(image))
    move_patches(model, std=0.5)
    model(image).square().sum().backward()
    fields = model.patch_embed.patching.localizer.fields
    assert all(layer.weight.grad.abs().max() > 0 for layer in fields.values())
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.adaptive_args() == model.adaptive_args()
    assert torch.equal(again(image), model(image))
    assert torch.isfinite(again(images(1, 3, 33, 70))).all()


@pytest.mark.parametrize('spec', [COARSE_FINE, {'name': 'coarse_fine', 'coarse': 16, 'fine': 49}])
def test_two_grids_cover_the_image_twice_and_each_reads_its_own_positions(spec, tmp_path):
    model = timm.create_model('test_apvit', num_patches=spec, img_size=160, dynamic_img_size=False).eval()
    image = images(2, 3, 160, 160)
    geometry = model.patch_geometry(image)
    grids = model.patch_embed.layout.grids
    assert model.num_patches == sum(each.num_patches for each in grids) == geometry.centres.shape[1]
    areas = geometry.extents.prod(dim=-1).split([each.num_patches for each in grids], dim=1)
    for area in areas:
        torch.testing.assert_close(area.sum(dim=1), torch.ones(2))
    tokens = model._pos_embed(model.patch_embed(image))[:, 1:]
    for grid, part in zip(grids, tokens.split([each.num_patches for each in grids], dim=1), strict=True):
        alone = timm.create_model('test_apvit', num_patches=grid.grid, img_size=160, dynamic_img_size=False).eval()
        alone.load_state_dict(model.state_dict())
        torch.testing.assert_close(part, alone._pos_embed(alone.patch_embed(image))[:, 1:])
    timm_apvit.save_pretrained(move_patches(model), tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(image), model(image))


def test_each_grid_moves_by_its_own_share_of_the_bounds():
    spec = {'name': 'coarse_fine', 'coarse': 4, 'fine': 9, 'coarse_motion': 0.0, 'fine_motion': 2.0}
    model = create(num_patches=spec, transform='affine', max_shift=0.1)
    geometry = model.patch_geometry(images(1, 3, 96, 96))
    anchors = model.patch_embed.layout.anchors(torch.device('cpu'))
    moved = ((geometry.centres - anchors.centres).abs() / (2 * anchors.extents)).amax(dim=(0, 2))
    assert (moved[:4] == 0).all()
    assert (geometry.rotation[:, :4] == 0).all()
    torch.testing.assert_close(geometry.extents[0, :4], anchors.extents[:4], rtol=0, atol=0)
    assert moved[4:].max() > 0.1


def test_a_window_gives_the_features_of_the_vit_on_that_crop(dinov2_file, photographs):
    """What lies in a window is told its place in the window, as a ViT knows crops."""
    run('localizer')
    overlay = {'file': dinov2_file, 'num_classes': 0, 'input_size': (3, 518, 518)}
    common = {'pretrained': True, 'pretrained_cfg_overlay': overlay, 'img_size': 112}
    vit = timm.create_model('vit_small_patch14_dinov2', **common).eval()
    cosines = []
    for photo, (left, top, side) in zip(
        photographs, [(0, 0, 224), (224, 112, 224), (56, 168, 112), (300, 20, 140)], strict=True
    ):
        image = (F.interpolate(photo, (448, 448), mode='bicubic', antialias=True).clamp(0, 1) - 0.45) / 0.23
        window = [(2 * left + side) / 448 - 1, (2 * top + side) / 448 - 1, side / 448]
        localizer = {'name': 'brightest', 'window': window}
        model = timm.create_model('apvit_small_patch14_dinov2', localizer=localizer, **common).eval()
        assert model.num_patches == 64
        crop = image[..., top : top + side, left : left + side]
        # Two filters against aliasing, whose own features differ by 0.998 at times; ours is the one or the other.
        resized = [
            F.interpolate(crop, (112, 112), mode='bilinear', antialias=True),
            F.interpolate(crop, 112, mode='area'),
        ]
        with torch.no_grad():
            ours, *theirs = (m.forward_features(x)[0, 0] for m, x in ((model, image), *((vit, x) for x in resized)))
        cosines.append(max(F.cosine_similarity(ours, each, dim=0).item() for each in theirs))
    assert min(cosines) >= 0.999, cosines


def test_jitter_of_windows_and_whole_images_are_for_training_alone():
    run('localizer')
    localizer = {'name': 'brightest', 'window': [0.2, -0.1, 0.4]}
    model = timm.create_model('test_apvit', localizer=localizer, window_jitter=0.1, whole_share=0.3)
    windows = model.patch_geometry(torch.rand(200, 3, 32, 32)).window
    whole = windows[:, 2] == 1
    assert 0.2 < whole.float().mean() < 0.4
    spread = windows[~whole].std(dim=0)
    torch.testing.assert_close(spread, torch.tensor([0.04, 0.04, 0.04]), rtol=0.3, atol=0)
    assert (windows[:, :2].abs() + windows[:, 2:] <= 1 + 1e-6).all()
    assert (model.eval().patch_geometry(torch.rand(2, 3, 32, 32)).window == torch.tensor([0.2, -0.1, 0.4])).all()


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'name': 'hexagons'}, 'expected layout to be one of coarse_fine'),
        ({'coarse': 4}, 'expected a layout with its name, one of coarse_fine'),
        ({'name': 'coarse_fine', 'coarse': 4}, "missing 1 required positional argument: 'fine'"),
        ({'name': 'coarse_fine', 'coarse': 4, 'fine': 9, 'finer': 3}, "unexpected keyword argument 'finer'"),
        ({'name': 'coarse_fine', 'coarse': 0, 'fine': 9}, 'expected coarse to be an integer >= 1'),
        (
            {'name': 'coarse_fine', 'coarse': 4, 'fine': 9, 'fine_motion': -1},
            'expected fine_motion to be a finite number',
        ),
        ({'name': 'coarse_fine', 'coarse': {4}, 'fine': 9}, 'that JSON can hold'),
        (True, 'expected num_patches to be an integer >= 1'),
    ],
)
def test_rejects_layouts_and_keeps_the_one_before(spec, message):
    model = create(num_patches=7)
    with pytest.raises(ValueError, match=message):
        model.set_num_patches(spec)
    assert model.num_patches == 7
    assert model.adaptive_args()['num_patches'] == 7


@pytest.mark.parametrize(
    ('localizer', 'message'),
    [
        ('resnet', 'expected localizer to be one of cnn'),
        (7, 'expected localizer to be one of cnn'),
        ({'name': 'cnn', 'sides': 32}, "unexpected keyword argument 'sides'"),
        ({'name': 'cnn', 'side': 30}, 'expected side to be a multiple of 16'),
        ({'name': 'cnn', 'side': torch.nn.ReLU}, 'that JSON can hold'),
    ],
)
def test_rejects_localizers(localizer, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_apvit', localizer=localizer)


@pytest.mark.parametrize(
    ('window', 'fields', 'message'),
    [
        (torch.zeros(2, 4), None, r'the window of the localizer to be a tensor of shape \[2, 3\], got shape \[2, 4\]'),
        (None, {}, r'shift of the localizer to be a tensor of shape \[2, 9, 2\], got NoneType'),
        (None, {'shift': torch.zeros(2, 8, 2), 'scale': torch.zeros(2, 9, 1)}, r'got shape \[2, 8, 2\]'),
    ],
)
def test_rejects_what_a_localizer_gives_by_name(window, fields, message, monkeypatch):
    model = create(num_patches=9)
    localizer = model.patch_embed.patching.localizer
    look = type(localizer).look
    monkeypatch.setattr(type(localizer), 'look', lambda self, pyramid: look(self, pyramid)._replace(window=window))
    if fields is not None:
        monkeypatch.setattr(type(localizer), 'forward', lambda self, look, anchors: fields)
    with pytest.raises(ValueError, match=message):
        model(images(2, 3, 64, 64))


@pytest.mark.parametrize('window', [[0, 0, 0], [2, 0, 0.5], [0, 0, 2], [0, 0, -0.5]])
def test_windows_out_of_range_are_put_inside(window):
    run('localizer')
    model = timm.create_model('test_apvit', localizer={'name': 'brightest', 'window': window}).eval()
    geometry = model.patch_geometry(images(1, 3, 64, 64))
    assert torch.isfinite(model(images(1, 3, 64, 64))).all()
    assert (geometry.window[:, :2].abs() + geometry.window[:, 2:] <= 1 + 1e-6).all()


def test_rejects_parts_that_are_none():
    class Half(Localizer):
        def level(self, image_size):
            return 0

    with pytest.raises(ValueError, match=r"got none of \['forward', 'look'\]"):
        register_localizer('half', Half)
    with pytest.raises(ValueError, match='expected a subclass of Localizer'):
        register_localizer('relu', torch.nn.ReLU)
    with pytest.raises(ValueError, match='expected a subclass of Layout'):
        register_layout('rows', Rows)
    with pytest.raises(ValueError, match='expected a name such as my_layout'):
        register_layout('my layout', type('Mine', (Layout,), {}))
    with pytest.raises(ValueError, match="expected a new name for Mine, got 'coarse_fine' of CoarseFine"):
        register_layout('coarse_fine', type('Mine', (Layout,), {}))


def test_a_window_of_ones_own():
    run('localizer')
    localizer = {'name': 'brightest', 'window': [0.2, -0.1, 0.4]}
    model = timm.create_model('test_apvit', localizer=localizer, window_jitter=0.01, whole_share=0.0)
    windows = model.patch_geometry(torch.rand(50, 3, 32, 32)).window
    assert ((windows - torch.tensor(localizer['window'])).abs() < 0.03).all()
    localizer['window'][2] = 0.9  # a later change of what was given changes nothing
    assert model.adaptive_args()['localizer']['window'] == [0.2, -0.1, 0.4]


def test_layouts_are_values_and_the_notation_is_jsons():
    assert resolve_layout(COARSE_FINE, (4, 4)) == resolve_layout(json.loads(json.dumps(COARSE_FINE)), (4, 4))
    assert resolve_layout(COARSE_FINE, (4, 4)) != resolve_layout({**COARSE_FINE, 'fine': 35}, (4, 4))
    assert len({resolve_layout(COARSE_FINE, (4, 4)), resolve_layout(COARSE_FINE, (4, 4))}) == 1
    assert check_num_patches(COARSE_FINE) == COARSE_FINE
    assert LAYOUTS['coarse_fine'] is CoarseFine


def test_a_checkpoint_of_another_localizer_is_refused_by_name(tmp_path):
    run('localizer')
    timm_apvit.save_pretrained(create(localizer='brightest'), tmp_path)
    with pytest.raises(ValueError, match='of a model with another localizer'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, localizer='cnn')
