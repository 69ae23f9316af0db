"""What timm and torch do with a ViT works with an APViT: options, initialisation, devices, compilers, checkpoints."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from conftest import create, randomise, relative, vit_and_apvit
from timm.models import create_feature_extractor
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import timm_apvit
from timm_apvit.patching.anchors import Anchors


@pytest.mark.parametrize(
    'kwargs',
    [
        {'in_chans': 1},
        {'in_chans': 5},
        {'num_classes': 0},
        {'patch_size': 32},
        {'patch_size': (8, 16)},
        {'img_size': (64, 96)},
        {'global_pool': 'avg'},
        {'global_pool': 'avgmax'},
        {'global_pool': 'map'},
        {'global_pool': ''},
        {'class_token': False, 'global_pool': 'avg'},
        {'reg_tokens': 4},
        {'reg_tokens': 4, 'no_embed_class': True},
        {'no_embed_class': True},
        {'pre_norm': True},
        {'init_values': 1e-2},
        {'pos_embed': 'none'},
        {'pos_embed': 'none', 'class_token': False, 'global_pool': 'avg'},
        {'qk_norm': True},
        {'final_norm': False},
        {'embed_norm_layer': nn.LayerNorm},
        {'dynamic_img_size': True, 'in_chans': 2},
        {'drop_path_rate': 0.2, 'drop_rate': 0.1, 'pos_drop_rate': 0.1, 'patch_drop_rate': 0.3},
    ],
    ids=str,
)
def test_every_option_of_timm_equals_the_vit(kwargs):
    kwargs = {'dynamic_img_size': False, 'img_size': 96, **kwargs}
    vit, model = vit_and_apvit('test_vit', 'test_apvit', **kwargs)
    image = torch.randn(2, kwargs.get('in_chans', 3), *vit.patch_embed.img_size)
    assert relative(model(image) - vit(image), vit(image)) <= 1e-4
    model.train()(image).sum().backward()


@pytest.mark.parametrize('mode', ['', 'jax', 'jax_nlhb', 'moco', 'skip', 'reset'])
def test_identity_after_every_weight_initialisation(mode):
    model = timm.create_model('test_apvit', weight_init=mode)
    assert {p.abs().max().item() for n, p in model.named_parameters() if 'localizer.fields' in n} == {0.0}
    model.init_weights()
    assert {p.abs().max().item() for n, p in model.named_parameters() if 'geometry_embed' in n} == {0.0}


@pytest.mark.parametrize('mode', ['', 'jax', 'moco', 'skip'])
def test_localizer_is_initialised_alike_in_every_mode(mode):
    model = timm.create_model('test_apvit', weight_init=mode)
    alone = timm_apvit.AdaptivePatching()
    stds = [patching.localizer.mlp[1].weight.std().item() for patching in (model.patch_embed.patching, alone)]
    assert stds[0] == pytest.approx(stds[1], rel=0.1)


def test_geometry_of_a_padded_image_is_that_of_the_image():
    model = timm.create_model('test_apvit', dynamic_img_pad=True)
    geometry = model.patch_geometry(torch.zeros(1, 3, 65, 40))
    size = torch.tensor([40.0, 65.0])
    corners = (geometry.outlines()[0] + 1) / 2 * size  # pixels: 5 x 3 patches of 16, which reach beyond the image
    torch.testing.assert_close(corners[0, 2], torch.tensor([16.0, 16.0]))
    torch.testing.assert_close(corners[-1, 2], torch.tensor([48.0, 80.0]))
    torch.testing.assert_close(geometry.extents[0, 0] * size, torch.tensor([16.0, 16.0]))


@pytest.mark.slow
@pytest.mark.parametrize('num', [None, 7])
@pytest.mark.parametrize('transform', ['scale', 'projective', 'tps'])
def test_compiles_without_a_graph_break_and_exports(num, transform):
    model = create(num_patches=num, num_classes=5, depth=2, transform=transform)
    image = torch.randn(2, 3, 96, 96)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    expected, actual = model(image), compiled(image)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    gradients = []
    for output in (expected, actual):
        model.zero_grad()
        output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    other = torch.randn(3, 3, 96, 96)
    torch.testing.assert_close(program.module()(other), model(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize('transform', ['scale', 'projective', 'tps'])
def test_device_meta_then_to_empty(transform):
    model = timm.create_model('test_apvit', device='meta', num_patches=7, transform=transform)
    assert model(torch.empty(2, 3, 50, 70, device='meta')).shape == (2, 1000)
    model = model.to_empty(device='cpu')
    source = create(num_patches=7, transform=transform)
    model.load_state_dict(source.state_dict())
    image = torch.randn(1, 3, 50, 70)
    torch.testing.assert_close(model.eval()(image), source(image), rtol=0, atol=0)
    assert not list(model.buffers())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_argument(dtype):
    model = timm.create_model('test_apvit', dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 3, 160, 160, dtype=dtype)).dtype == dtype


def test_reset_classifier_attention_mask_and_checkpointing():
    vit, model = vit_and_apvit('test_vit', 'test_apvit')
    image = torch.randn(2, 3, 160, 160)
    mask = torch.ones(101, 101, dtype=torch.bool).tril()
    for options in ({'attn_mask': mask}, {'is_causal': True}):
        torch.testing.assert_close(model(image, **options), vit(image, **options), rtol=0, atol=1e-3)
    plain = model(image)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.train()(image), plain, rtol=0, atol=1e-5)
    model.reset_classifier(3, 'avg')
    assert model(image).shape == (2, 3)


def test_layer_decay_gives_what_a_vit_does_not_have_the_full_rate():
    model = timm.create_model('apvit_tiny')
    for groups in (
        param_groups_layer_decay(model, layer_decay=0.5),
        create_optimizer_v2(model, opt='adamw', lr=1.0, layer_decay=0.5).param_groups,
    ):
        scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
        named = {name: scale[id(p)] for name, p in model.named_parameters()}
        adaptive = {s for n, s in named.items() if 'patching' in n or 'geometry_embed' in n}
        assert adaptive == {1.0} == {named['head.weight']}
        assert named['patch_embed.proj.weight'] == named['pos_embed'] == min(named.values()) < 0.001
    assert {'pos_embed', 'cls_token'} <= model.no_weight_decay()


@pytest.mark.parametrize('transform', ['scale', 'projective', 'tps'])
def test_copies_and_pickles(transform):
    model, image = create(num_patches=11, transform=transform), torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(image), model(image), rtol=0, atol=0)
        assert twin.num_patches == 11
        twin.load_state_dict(timm.create_model('test_vit').state_dict())


def test_a_plain_vits_state_loads_strictly_and_any_other_fails_by_name():
    model, vit = create(), randomise(timm.create_model('test_vit'))
    shift = model.patch_embed.patching.localizer.fields['shift'].weight.clone()
    model.load_state_dict(vit.state_dict())
    torch.testing.assert_close(model.patch_embed.patching.localizer.fields['shift'].weight, shift)
    state = vit.state_dict()
    del state['blocks.3.attn.qkv.weight']
    with pytest.raises(RuntimeError, match=r'blocks\.3\.attn\.qkv\.weight'):
        model.load_state_dict(state)
    state = model.state_dict()
    del state['patch_embed.patching.localizer.stem.0.0.weight']
    with pytest.raises(RuntimeError, match=r'localizer\.stem\.0\.0\.weight'):
        model.load_state_dict(state)


@pytest.mark.parametrize('transform', timm_apvit.TRANSFORMS)
def test_dtype_geometry_is_float32_under_autocast_and_in_bfloat16(transform):
    model, image = create(transform=transform, num_classes=3, num_patches=9), torch.randn(2, 3, 96, 96)
    patching, anchors = model.patch_embed.patching, Anchors(torch.zeros(9, 2), torch.full((9, 2), 0.2))
    raw = {name: torch.randn(2, 9, width) for name, width in patching.transform.fields.items()}
    local = torch.rand(7, 2) * 2 - 1
    expected = patching.transform(raw, anchors, (96, 96)).points(local)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cast = copy.deepcopy(patching.transform).bfloat16()
        for family in (patching.transform, cast):
            torch.testing.assert_close(family(raw, anchors, (96, 96)).points(local), expected, rtol=0, atol=2e-6)
    assert model.bfloat16().patch_geometry(image.bfloat16()).outlines(3).dtype == torch.float32


def test_loading_a_vit_into_a_meta_model_reports_what_it_lacks():
    model = timm.create_model('test_apvit', device='meta')
    with pytest.raises(RuntimeError, match=r'Missing key.*localizer'):
        model.load_state_dict(timm.create_model('test_vit').state_dict(), assign=True)


@pytest.mark.parametrize('prune', [{'prune_head': False}, {'prune_norm': True}])
def test_a_pruned_model_saves_and_loads(tmp_path, prune):
    model, image = create(max_zoom=np.float32(3)), torch.randn(1, 3, 160, 160)
    model.prune_intermediate_layers([0, 1], **prune)
    timm_apvit.save_pretrained(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)


@pytest.mark.parametrize('change', [{'reg_tokens': 2}, {'class_token': False, 'global_pool': 'avg'}])
def test_other_prefix_tokens_are_refused_by_name(tmp_path, change):
    timm_apvit.save_pretrained(create(), tmp_path)
    with pytest.raises(ValueError, match=r'prefix tokens and a grid, got .*pos_embed.*\[1, 101, 64\].*cls_token'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **change)


def test_no_state_is_left_by_a_forward():
    model, image = create(), torch.randn(1, 3, 64, 96)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(image)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('transform', ['scale', 'tps'])
def test_traced_is_eager_at_any_batch_and_can_be_saved(transform, grad, tmp_path):
    model = create(transform=transform, num_classes=3, num_patches=9, img_size=96)
    with torch.set_grad_enabled(grad):
        torch.jit.trace(model, torch.randn(2, 3, 96, 96)).save(tmp_path / 'traced.pt')
    image = torch.randn(5, 3, 96, 96)
    torch.testing.assert_close(torch.jit.load(tmp_path / 'traced.pt')(image), model(image), rtol=0, atol=1e-5)


def test_feature_extractor_of_fx_gives_the_tokens_after_blocks():
    model, image = create(num_patches=7, depth=3), torch.randn(2, 3, 96, 96)
    found = create_feature_extractor(model, {'blocks.0': 'first', 'blocks.2': 'last'})(image)
    expected = model.forward_intermediates(image, indices=[0, 2], output_fmt='NLC', intermediates_only=True)
    assert list(found) == ['first', 'last']
    for tokens, own in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(tokens[:, model.num_prefix_tokens :], own, rtol=0, atol=1e-5)
