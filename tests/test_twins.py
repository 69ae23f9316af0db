"""Twins of every family of timm's ViTs: the ViT's own output, whole round trips, and the way there and back."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import create, images, move_patches, randomise, relative

import timm_apvit
from timm_apvit.models.rope import rope_at
from timm_apvit.models.vits import ADAPTIVE_CLASSES

# Of the standard deviation: of logits and pooled features, of tokens and maps.
POOLED, TOKENS = 1e-4, 2e-4
# Depth and size are reduced; everything else is the family's own.
FAMILIES = {
    'vit_small_patch14_reg4_dinov2': (98, 70),
    'vit_base_patch32_clip_quickgelu_224': (96, 160),
    'vit_base_patch16_siglip_224': (80, 64),
    'vit_so400m_patch14_siglip_224': (56, 70),
    'deit3_small_patch16_224': (80, 48),
    'deit_tiny_distilled_patch16_224': (64, 96),
    'vit_small_patch16_dinov3': (80, 96),
    'eva02_tiny_patch14_224': (84, 98),
    'vit_pe_core_tiny_patch16_384': (96, 80),
    'vit_small_patch16_rope_mixed_224': (80, 96),
    'vit_small_patch16_rope_ape_224': (96, 80),
    'beit3_base_patch16_224': (64, 48),
}
families = pytest.mark.parametrize(('name', 'size'), FAMILIES.items(), ids=FAMILIES)


def loud(model, std=0.04):
    """Random weights and a loud position embedding, in eval mode; noise on all weights of a deviation ``std``."""
    randomise(model, std=std)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(('gamma', 'gamma_1', 'gamma_2')):  # layer scale
                parameter.uniform_(0.5, 1)
    return model.eval()


def pair(name, size=None, depth=2, std=0.04, **kwargs):
    """A ViT and its twin, with the ViT's weights."""
    kwargs = {**({} if size is None else {'img_size': size}), **kwargs}
    if 'sapiens2' in name:  # which has other attention in some of its blocks
        kwargs['num_kv_heads'] = (None,) * depth
    vit = loud(timm.create_model(name, depth=depth, **kwargs), std)
    twin = timm.create_model(timm_apvit.twin_name(name), depth=depth, **kwargs).eval()
    twin.load_state_dict(vit.state_dict())
    return vit, twin


@torch.no_grad()
def differences(twin, vit, image):
    """How far a twin is from its ViT: logits and pooled features, then tokens and maps."""
    tokens, own = vit.forward_features(image), twin.forward_features(image)
    pooled = [(m.forward_head(x, pre_logits=True)) for m, x in ((twin, own), (vit, tokens))]
    maps, own_maps = (m.forward_intermediates(image, intermediates_only=True)[-1] for m in (vit, twin))
    logits = [m(image) for m in (twin, vit)]
    return [relative(a - b, b) for a, b in (logits, pooled)], [
        relative(own - tokens, tokens),
        relative(own_maps - maps, maps),
    ]


@families
def test_twin_is_the_vit(name, size):
    vit, twin = pair(name, size, num_classes=10)
    assert isinstance(twin, timm_apvit.APViT)
    assert isinstance(twin, type(vit))
    assert type(twin) is ADAPTIVE_CLASSES[type(vit)]
    image = images(2, 3, *size)
    pooled, tokens = differences(twin, vit, image)
    assert max(pooled) <= POOLED, pooled
    assert max(tokens) <= TOKENS, tokens
    twin.train()
    expected = vit.train()(image)
    assert relative(twin(image) - expected, expected) <= POOLED


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', timm.list_models(module=['vision_transformer', 'deit', 'eva']))
def test_every_twin_is_the_vit(name):
    vit, twin = pair(name, std=0.0)  # as they begin: more noise on wide models is more than float32 holds
    width = vit.patch_embed.patch_size[1]
    # Rounding of a sample's place grows with the image: tokens of noise at 1024 pixels are 2.2e-4 off.
    height, columns = (min(side, 518) // width for side in vit.patch_embed.img_size)
    size = (height * width, max(1, columns - 2) * width)  # not square
    for each in (vit, twin):
        each.set_input_size(size)
    pooled, tokens = differences(twin, vit, images(1, 3, *size))
    assert max(pooled) <= POOLED, pooled
    assert max(tokens) <= TOKENS, tokens


@families
def test_round_trip_of_a_family(name, size, tmp_path):
    model = timm.create_model(timm_apvit.twin_name(name), depth=2, img_size=size, num_patches=11, num_classes=7)
    model = move_patches(loud(model), std=0.3).eval()
    image = images(2, 3, *size)
    expected = model(image)
    assert torch.isfinite(expected).all()
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.adaptive_args() == model.adaptive_args()
    assert torch.equal(again(image), expected)
    features = timm.create_model(
        f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=[0, 1]
    ).eval()
    final, maps = model.forward_intermediates(image, [0, 1])
    assert torch.equal(final, model.forward_features(image))
    for ours, theirs in zip(features(image), maps, strict=True):
        torch.testing.assert_close(ours, theirs)
    for checkpointing in (True, False):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(image).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    model.set_num_patches(5)
    model.set_input_size((size[1] + 37, size[0] + 11))
    model.reset_classifier(3)
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    other = images(1, 3, 50, 61)
    assert torch.equal(again(other), model(other))
    assert again(other).shape == (1, 3)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.isfinite(model(other)).all()
    assert torch.isfinite(copy.deepcopy(model).bfloat16()(other.bfloat16())).all()


@families
def test_adapt_and_the_way_back(name, size, tmp_path):
    vit = loud(timm.create_model(name, depth=2, img_size=size, num_classes=5)).double()
    vit.blocks[0].train()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    model = timm_apvit.adapt(vit, transform='affine', max_rotation=10)
    image = images(2, 3, *size).double()
    assert relative(model(image) - vit(image), vit(image)) <= POOLED
    assert [m.training for m in model.blocks] == [True, False]
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.pretrained_cfg['architecture'] == timm_apvit.twin_name(name)
    assert vit.pretrained_cfg['architecture'] == name
    back = timm_apvit.vit_of(model)
    assert type(back) is type(vit)
    assert repr(back) == repr(vit)
    assert torch.equal(back(image), vit(image))
    assert timm.models.get_pretrained_cfg(back.pretrained_cfg['architecture']) is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())  # nothing is shared
    model = move_patches(timm_apvit.adapt(vit.float(), num_patches=6)).eval()
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(image.float()), model.eval()(image.float()))


@pytest.mark.parametrize(
    'name', ['vit_small_patch16_dinov3', 'vit_small_patch16_rope_mixed_224', 'eva02_tiny_patch14_224']
)
def test_rope_between_cells_is_timms_own_of_a_finer_grid(name):
    """Angles are affine in the position: so an index between cells has the angle that timm gives it on its own."""
    rope = timm.create_model(name, depth=1, img_size=(14 * 16, 10 * 16) if 'eva' not in name else (196, 140)).rope
    grid = (14, 10)
    column, row = torch.tensor([0.0, 3.25, 9.0, 4.5]), torch.tensor([0.0, 7.5, 13.0, 2.75])
    positions = torch.stack([(2 * column + 1) / 10 - 1, (2 * row + 1) / 14 - 1], dim=-1)[None]
    ours = rope_at(rope, positions, grid)
    table = rope.get_embed(shape=list(grid))
    at_cells = (row * 10 + column).long()
    for n in (0, 2):
        torch.testing.assert_close(ours[0, ..., n, :], table[..., at_cells[n], :], rtol=0, atol=3e-6)
    # Between cells: sums of angles, in float64, from the unit cells of timm's table.
    sine, cosine = table.double().chunk(2, dim=-1)
    angle = torch.atan2(sine, cosine)
    wrapped = lambda a: torch.atan2(a.sin(), a.cos())  # noqa: E731
    along_x, along_y = wrapped(angle[..., 1, :] - angle[..., 0, :]), wrapped(angle[..., 10, :] - angle[..., 0, :])
    for n in (1, 3):
        expected = angle[..., 0, :] + column[n] * along_x + row[n] * along_y
        actual = ours[0, ..., n, :].double().chunk(2, dim=-1)
        assert max((actual[0] - expected.sin()).abs().max(), (actual[1] - expected.cos()).abs().max()) < 2e-5
    assert rope_at(rope, torch.full((1, 1, 2), float('nan')), grid).isnan().any()


def test_fewer_patches_of_a_rope_model_are_the_vit_on_the_area_averaged_image():
    """DINOv3's angles are in units of the image, so half the cells of half the image are told the same places."""
    vit = loud(timm.create_model('vit_small_patch16_dinov3', depth=2, img_size=128))
    model = timm.create_model('apvit_small_patch16_dinov3', depth=2, img_size=256, num_patches=64).eval()
    model.load_state_dict(vit.state_dict())
    image = images(1, 3, 256, 256)
    expected = vit(F.avg_pool2d(image, 2))
    assert relative(model(image) - expected, expected) <= POOLED


@pytest.mark.slow
@families
def test_compiles_and_exports_with_a_dynamic_batch(name, size):
    model = timm.create_model(timm_apvit.twin_name(name), depth=1, img_size=size, num_patches=6, num_classes=3)
    model = move_patches(loud(model), std=0.3)
    batch = {'x': {0: torch.export.Dim('batch', min=1, max=8)}}
    program = torch.export.export(model, (images(2, 3, *size),), dynamic_shapes=batch)
    other = images(3, 3, *size)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(other), model(other), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_patch_dropout_keeps_each_tokens_own_rotation():
    for name in ('apvit_small_patch16_dinov3', 'apvit_small_patch16_rope_mixed_224'):
        model = loud(timm.create_model(name, depth=1, img_size=64, patch_drop_rate=0.5)).train()
        tokens, rope = model._pos_embed(model.patch_embed(images(2, 3, 64, 64)))
        assert tokens.shape[1] == model.num_prefix_tokens + 8
        assert rope.shape[-2] == 8
        assert torch.isfinite(model(images(2, 3, 64, 64))).all()
        with pytest.raises(ValueError, match='the tokens of all 16 patches for a map, got 8'):
            model.forward_intermediates(images(2, 3, 64, 64))


def test_a_part_of_a_checkpoint_changes_nothing_else():
    """Adapters and single modules are loaded with ``strict=False``."""
    model = create(transform='affine')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = {
        'patch_embed.patching.localizer.stem.0.0.weight': torch.ones_like(
            before['patch_embed.patching.localizer.stem.0.0.weight']
        ),
        'blocks.0.norm1.bias': torch.ones(64),
    }
    missing = model.load_state_dict(part, strict=False)
    assert len(missing.missing_keys) == len(before) - len(part)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(part)


def test_checkpoints_from_before_windows_had_features_load():
    model = create()
    former = {
        key: value[:, :7] if key.endswith('geometry_embed.weight') else value
        for key, value in model.state_dict().items()
    }
    again = timm.create_model('test_apvit').eval()
    again.load_state_dict(former)
    for key, value in again.state_dict().items():
        expected = model.state_dict()[key]
        if key.endswith('geometry_embed.weight'):
            assert (value[:, 7:] == 0).all()
            value, expected = value[:, :7], expected[:, :7]
        assert torch.equal(value, expected)
