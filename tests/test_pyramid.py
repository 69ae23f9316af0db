"""A feature pyramid: strides, sizes, any number of patches, errors."""

import pytest
import timm
import torch
from conftest import create, move_patches

import timm_apvit
from timm_apvit.models.dense import dense_map, quarters, splat_weights


def sizes(maps):
    return [tuple(each.shape[1:]) for each in maps]


@pytest.mark.parametrize('name', ['test_apvit', 'test_vit', 'apvit_eva02_tiny_patch14_224', 'vit_tiny_patch16_224'])
def test_strides_are_those_of_the_image_whatever_the_patches(name):
    model = timm.create_model(f'pyramid.{name}', features_only=True, out_channels=8).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [8] * 4
    expected = [(8, 24, 40), (8, 12, 20), (8, 6, 10), (8, 3, 5)]
    assert sizes(model(torch.randn(1, 3, 96, 160))) == expected
    if 'apvit' in name:
        model.set_num_patches(7)
        assert sizes(model(torch.randn(1, 3, 96, 160))) == expected
        assert model.vit.num_patches == 7


@pytest.mark.parametrize('size', [(64, 65), (70, 90), (33, 200)])
def test_sizes_that_are_no_multiple_are_rounded_up(size):
    grid = [-(-length // 16) for length in size]
    maps = timm_apvit.pyramid('test_apvit', strides=(2, 8, 16, 32), out_channels=4)(torch.randn(2, 3, *size))
    assert sizes(maps) == [
        (4, *(8 * n for n in grid)), (4, *(2 * n for n in grid)), (4, *grid), (4, *(-(-n // 2) for n in grid))
    ]  # fmt: skip


def test_it_reads_the_last_map_of_the_model_that_it_is_given():
    vit = move_patches(create(num_patches=9, num_classes=3)).eval()
    x = torch.randn(2, 3, 96, 128)
    tokens = vit.forward_features(x)[:, vit.num_prefix_tokens :]
    expected = dense_map(tokens, splat_weights(vit.patch_embed(x).geometry, (6, 8)), (6, 8))
    pyramid = timm_apvit.pyramid(vit)
    found, places = pyramid.tokens_of(x, (6, 8))
    torch.testing.assert_close(places.onto((6, 8))(found), expected)
    assert pyramid.vit is vit
    assert isinstance(vit.head, torch.nn.Identity)
    shorter = timm_apvit.pyramid(create(num_patches=9), block=1)
    assert len(shorter.vit.blocks) == 2


@pytest.mark.parametrize(('name', 'size', 'arguments'), [
    ('apvit_tiny_patch16_224', 125, {'img_size': 125}),
    ('test_apvit', 65, {'num_patches': (5, 5)}),
    ('test_apvit', 65, {'dynamic_img_size': True, 'dynamic_img_pad': True}),
    ('test_apvit', 128, {'num_patches': (4, 4)}),
    ('test_vit', 65, {}),
    ('vit_small_patch14_dinov2', 112, {}),
])  # fmt: skip
def test_cells_lie_where_they_say(name, size, arguments, monkeypatch):
    """Tokens that carry their centres in pixels, in the place of features: cell j is to read 16 * j + 8."""
    model = timm_apvit.pyramid(name, **arguments).eval()
    vit, x, grid = model.vit, torch.randn(1, 3, size, size), -(-size // 16)

    def centres(images, output_fmt='NCHW', **_):
        if output_fmt == 'NLC':
            canvas = vit.patch_embed.canvas_size((size, size))
            assert canvas[0] == canvas[1]
            return [(images.geometry.centres + 1) / 2 * canvas[0]]
        patch = vit.patch_embed.patch_size[0]
        places = (torch.arange(-(-size // patch)) + 0.5) * patch
        return [torch.stack(torch.meshgrid(places, places, indexing='xy'))[None]]

    monkeypatch.setattr(vit, 'forward_intermediates', centres)
    tokens, places = model.tokens_of(x, (grid, grid))
    across = places.onto((grid, grid))(tokens)[0, 0]
    expected = (16 * torch.arange(grid) + 8.0).expand(grid, grid)
    tolerance = 1e-3 if name == 'test_vit' else 8.1  # of a cell that no patch sees, or whose patch is larger than it
    inner = slice(1, grid - 1)
    assert (across - expected)[inner, inner].abs().max() < tolerance
    assert (across - expected)[inner, inner].mean().abs() < 1.5


@pytest.mark.parametrize('size', [(160, 160), (160, 96)])
def test_an_untrained_twin_has_the_pyramid_of_its_vit(size):
    vit = timm.create_model('test_vit', dynamic_img_size=True).eval()
    twin = timm_apvit.adapt(vit).eval()
    torch.manual_seed(0)
    theirs = timm_apvit.pyramid(vit, strides=(4, 8, 16, 32), out_channels=8).eval()
    torch.manual_seed(0)
    ours = timm_apvit.pyramid(twin, strides=(4, 8, 16, 32), out_channels=8).eval()
    x = torch.randn(2, 3, *size)
    for ours_each, each in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(ours_each, each, atol=1e-4, rtol=1e-4)
        assert each.std() > 0


@pytest.mark.parametrize('transform', ['affine', 'projective', 'tps'])
def test_quarters_lie_where_their_part_of_a_patch_does(transform):
    model = move_patches(create(num_patches=9, transform=transform)).eval()
    geometry = model.patch_geometry(torch.randn(2, 3, 96, 128))
    parts = quarters(geometry)
    assert parts.centres.shape == (2, 36, 2)
    corners = torch.tensor([[-1.0, -1.0], [1, -1], [-1, 1], [1, 1]])
    # The outer corner of each quarter is that of the patch, and their inner ones meet at its centre.
    own = corners.repeat(9, 1)
    torch.testing.assert_close(parts.points(own[0]), parts.centres + parts.image_from_patch @ own[0])

    def error(matrices):
        half = (matrices @ own.unsqueeze(-1)).squeeze(-1)
        outer, inner = ((parts.centres + sign * half).reshape(2, 9, 4, 2) for sign in (1, -1))
        return ((outer - geometry.points(corners)).abs() + (inner - geometry.centres.unsqueeze(2)).abs()).mean()

    # Of a warp these are the parallelograms that it makes of quarters, nearer than those that it makes of the patch.
    straight = error((geometry.image_from_patch / 2).repeat_interleave(4, dim=1))
    assert error(parts.image_from_patch) < (1e-6 if transform == 'affine' else 0.8 * straight)


@pytest.mark.parametrize('name', ['test_vit', 'test_apvit'])
def test_on_a_grid_quarters_are_a_transposed_convolution(name):
    """What they take the place of."""
    model = timm_apvit.pyramid(name, strides=(8, 16), out_channels=8, img_size=160).eval()
    x, (split, layers) = torch.randn(2, 3, 160, 160), (model.scales[0].split, model.scales[0].layers)
    tokens, places = model.tokens_of(x, (10, 10))
    kernel = split.weight.reshape(2, 2, 32, 64).permute(3, 2, 0, 1)
    bias = split.bias.reshape(4, 32)
    expected = torch.nn.functional.conv_transpose2d(places.onto((10, 10))(tokens), kernel, stride=2)
    expected = expected + bias.reshape(2, 2, 32).permute(2, 0, 1).repeat(1, 10, 10)
    torch.testing.assert_close(model(x)[0], layers(expected), atol=1e-4, rtol=1e-4)


def test_a_batch_may_be_empty():
    maps = timm_apvit.pyramid('test_apvit', out_channels=8).eval()(torch.randn(0, 3, 64, 64))
    assert [tuple(each.shape) for each in maps] == [(0, 8, n, n) for n in (16, 8, 4, 2)]


@pytest.mark.parametrize('moved', [False, True])
def test_quarters_tell_a_finer_map_more(moved):
    """Tokens that carry the places of their quarters: how far off a map of 8 pixels is, beside one of their patches."""
    model = create(num_patches=(4, 4), **({} if moved else {'max_shift': 0.0, 'max_zoom': 1.0})).eval()
    geometry = move_patches(model).patch_geometry(torch.randn(4, 3, 64, 64))
    weights = splat_weights(quarters(geometry), (8, 8))
    truth = torch.stack(torch.meshgrid(*[(torch.arange(8) * 2 + 1) / 8 - 1] * 2, indexing='xy'))
    fine = (dense_map(quarters(geometry).centres, weights, (8, 8)) - truth).abs().mean(dim=1)
    coarse = (dense_map(geometry.centres, splat_weights(geometry, (8, 8)), (8, 8)) - truth).abs().mean(dim=1)
    seen = weights.coverage > 0.9
    assert seen.sum() > 50
    assert fine[seen].mean() < (0.7 * coarse[seen].mean() if moved else 1e-5)


def test_chosen_maps_as_a_list_or_under_names():
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    model = timm.create_model('pyramid.test_apvit', features_only=True, out_indices=(1, -1), out_channels=8).eval()
    assert model.feature_info.reduction() == [8, 32]
    assert len(model.feature_info.info) == 4
    torch.manual_seed(0)
    named = timm_apvit.pyramid('test_apvit', strides=(8, 32), out_channels=8, feature_cls='dict').eval()
    assert list(named(x)) == ['0', '1']
    for ours, theirs in zip(named(x).values(), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_come_through_the_name(tmp_path):
    vit = create(num_classes=2, num_patches=9)
    timm_apvit.save_pretrained(vit, tmp_path)
    overlay = {'file': str(tmp_path / 'model.safetensors'), 'num_classes': 2}
    loaded = timm.create_model(
        'pyramid.test_apvit', pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, num_patches=9
    )
    x = torch.randn(1, 3, 160, 160)
    expected = timm_apvit.pyramid(vit).eval().tokens_of(x, (10, 10))[0]
    torch.testing.assert_close(loaded.eval().tokens_of(x, (10, 10))[0], expected)


def test_every_parameter_learns_and_checkpointing_changes_nothing():
    model = timm_apvit.pyramid(move_patches(create(num_patches=9)), out_channels=8)
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(each.square().mean() for each in model(x)).backward()
        assert all(p.grad is not None for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(('arguments', 'expected'), [
    ({'strides': (4, 12)}, r'strides of \(2, 4, 8, 16, 32, 64\), each once and in rising order, got \(4, 12\)'),
    ({'strides': (8, 4)}, r'rising order, got \(8, 4\)'),
    ({'strides': ()}, r'got \(\)'),
    ({'out_channels': 0}, 'out_channels to be an integer >= 1, got 0'),
    ({'out_indices': (4,)}, r'out_indices of the 4 strides \(4, 8, 16, 32\), got \(4,\)'),
    ({'block': 6}, 'a block of -6 to 5, got 6'),
    ({'feature_cls': 'hook'}, "'list' or 'dict', got 'hook'"),
    ({'output_stride': 8}, 'output_stride=32 or None .* got features_only=True and output_stride=8'),
])  # fmt: skip
def test_rejects(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        timm.create_model('pyramid.test_apvit', **arguments)


def test_rejects_what_is_no_vit_and_what_cannot_be_told():
    with pytest.raises(ValueError, match=r"such as 'pyramid\.apvit_small' by a name of timm, or a built one, got None"):
        timm.create_model('pyramid', features_only=True)
    with pytest.raises(ValueError, match="got 'no_such_vit': timm has no such model"):
        timm.create_model('pyramid.no_such_vit')
    with pytest.raises(ValueError, match="a ViT of timm that has an adaptive twin, got 'resnet18'"):
        timm_apvit.pyramid('resnet18')
    with pytest.raises(TypeError, match='arguments of create_model, got img_size'):
        timm.create_model('pyramid', vit=create(), img_size=64)
    assert isinstance(timm.create_model('pyramid', vit=create()), timm_apvit.FeaturePyramid)
    with pytest.raises(ValueError, match='expected an APViT, got VisionTransformer'):
        timm_apvit.pyramid('test_vit').set_num_patches(4)
    with pytest.raises(ValueError, match='an APViT or a ViT of timm, got ResNet'):
        timm_apvit.pyramid(timm.create_model('resnet18'))
    with pytest.raises(ValueError, match='an APViT or a ViT of timm, got DataParallel; give its model'):
        timm_apvit.pyramid(torch.nn.DataParallel(create()))
    with pytest.raises(TypeError, match='a name for arguments of create_model, got num_patches'):
        timm_apvit.pyramid(create(), num_patches=9)
    with pytest.raises(ValueError, match=r'at least 32 pixels, the coarsest stride, got \(31, 64\)'):
        timm_apvit.pyramid(create())(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match='the tokens of all 100 patches for a map, got 50: set patch_drop_rate=0'):
        timm_apvit.pyramid(create(patch_drop_rate=0.5)).train()(torch.randn(1, 3, 160, 160))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_apvit', 'test_vit'])
def test_compiled_and_exported_it_gives_the_same(name):
    model = timm_apvit.pyramid(name, out_channels=8, **({'num_patches': 30} if 'ap' in name else {})).eval()
    x = torch.randn(2, 3, 160, 160)
    if 'ap' in name:
        move_patches(model.vit)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        for each in (exported, compiled):
            for ours, theirs in zip(each(x), model(x), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_timm_knows_it_and_does_not_list_it():
    assert timm.is_model('pyramid')
    assert 'pyramid' not in timm.list_models()
