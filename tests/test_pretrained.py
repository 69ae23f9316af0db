"""Pretrained weights reach a model by every route that timm has, and a wrong checkpoint never does."""

import json
import re
import zipfile

import numpy as np
import pytest
import timm
import torch
from conftest import assert_equal_up_to_rounding, images, randomise
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import timm_apvit
from timm_apvit.models.checkpoint import ADAPTIVE_KEYS

FIELDS = 'patch_embed.patching.localizer.fields.'
REFUSED = (RuntimeError, ValueError, KeyError)
# Where the head or the channels differ, timm loads leniently.
MODES = {
    'same': {},
    'classes': {'num_classes': 7},
    'grey': {'in_chans': 1},
    'features': {'features_only': True, 'out_indices': (2, 5)},
}
each_mode = pytest.mark.parametrize('kwargs', MODES.values(), ids=MODES)
SQUARE = (2, 3, 160, 160)


def adaptive(seed=0, **kwargs):
    """A small model whose patches have moved."""
    return randomise(timm.create_model('test_apvit', **kwargs), seed, std=0.1).eval()


def create(file, name='test_apvit', **kwargs):
    """Create a pretrained model from a file, by timm's own means."""
    overlay = {'file': str(file), 'custom_load': file.suffix == '.npz'}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def saved(state_dict, folder):
    save_file(state_dict, folder / 'model.safetensors')
    return folder / 'model.safetensors'


def jax_arrays(vit):
    """The arrays of a ViT in the layout of Google's .npz files: what timm's ``load_pretrained`` reads."""
    state = {key: value.numpy() for key, value in vit.state_dict().items()}
    arrays = {
        'embedding/kernel': state['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
        'embedding/bias': state['patch_embed.proj.bias'],
        'cls': state['cls_token'],
        'Transformer/posembed_input/pos_embedding': state['pos_embed'],
    }
    heads = (vit.blocks[0].attn.num_heads, vit.blocks[0].attn.head_dim)
    norms, linears = {'norm': 'Transformer/encoder_norm'}, {'head': 'head'}
    for i in range(len(vit.blocks)):
        ours, theirs = f'blocks.{i}.', f'Transformer/encoderblock_{i}/'
        norms |= {f'{ours}norm1': f'{theirs}LayerNorm_0', f'{ours}norm2': f'{theirs}LayerNorm_2'}
        linears |= {f'{ours}mlp.fc{j + 1}': f'{theirs}MlpBlock_3/Dense_{j}' for j in range(2)}
        attention = f'{theirs}MultiHeadDotProductAttention_1/'
        weights, biases = (np.split(state[f'{ours}attn.qkv.{kind}'], 3) for kind in ('weight', 'bias'))
        for part, weight, bias in zip(('query', 'key', 'value'), weights, biases, strict=True):
            arrays[f'{attention}{part}/kernel'] = weight.T.reshape(-1, *heads)
            arrays[f'{attention}{part}/bias'] = bias.reshape(heads)
        arrays[f'{attention}out/kernel'] = state[f'{ours}attn.proj.weight'].T.reshape(*heads, -1)
        arrays[f'{attention}out/bias'] = state[f'{ours}attn.proj.bias']
    for ours, theirs in (norms | linears).items():
        kernel, bias = state[f'{ours}.weight'], state[f'{ours}.bias']
        arrays |= {f'{theirs}/kernel' if ours in linears else f'{theirs}/scale': kernel.T, f'{theirs}/bias': bias}
    return arrays


@pytest.fixture(scope='module')
def vit():
    return randomise(timm.create_model('test_vit'), std=0.1).eval()


@pytest.fixture(scope='module')
def files(vit, tmp_path_factory):
    """One ViT in every format."""
    folder = tmp_path_factory.mktemp('vit')
    state = vit.state_dict()
    torch.save(state, folder / 'vit.pth')
    torch.save({'epoch': 3, 'state_dict': {f'module.{key}': state[key] for key in state}}, folder / 'train.pth.tar')
    np.savez(folder / 'vit.npz', **jax_arrays(vit))
    return {'safetensors': saved(state, folder)} | {path.suffix[1:]: path for path in folder.glob('*.[pnt]*')}


def test_model_from_a_file_claims_no_source_and_what_was_saved_keeps_its_own(files, tmp_path):
    model = create(files['safetensors'])
    assert model.base_model is None
    assert timm.create_model('test_apvit').base_model is None
    for base in (None, 'timm/test_vit.r160_in1k'):
        model.base_model = base
        timm_apvit.save_pretrained(model, tmp_path)
        assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).base_model == base
        assert timm.create_model(f'local-dir:{tmp_path}').base_model is None


@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'tar', 'npz'])
def test_file_of_a_vit_gives_the_vit(kind, files, vit):
    x = images(*SQUARE)
    assert_equal_up_to_rounding(timm.create_model('test_vit', checkpoint_path=str(files['npz'])).eval()(x), vit(x))
    assert_equal_up_to_rounding(create(files[kind])(x), vit(x))
    assert_equal_up_to_rounding(timm.create_model('test_apvit', checkpoint_path=str(files[kind])).eval()(x), vit(x))


@pytest.mark.parametrize('kwargs', [*MODES.values(), {'num_patches': 7}, {'img_size': (96, 128)}])
def test_npz_adapts_as_timm_does(kwargs, files):
    reference = ('safetensors', 'test_apvit') if 'num_patches' in kwargs else ('npz', 'test_vit')
    models = create(files[reference[0]], reference[1], **kwargs), create(files['npz'], **kwargs)
    expected, actual = (getattr(model, 'model', model).forward_features for model in models)
    x = images(2, kwargs.get('in_chans', 3), *kwargs.get('img_size', SQUARE[2:]))
    assert_equal_up_to_rounding(actual(x), expected(x))


def test_local_directory_of_a_vit_gives_the_vit(files, vit, tmp_path):
    saved(load_file(files['safetensors']), tmp_path)
    config = {'architecture': 'test_apvit', 'pretrained_cfg': vit.pretrained_cfg}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert_equal_up_to_rounding(model(images(*SQUARE)), vit(images(*SQUARE)))


def test_checkpoint_with_the_former_name_of_the_fields_loads(tmp_path):
    model = adaptive(num_patches=9)
    former = {key.replace(FIELDS, FIELDS.replace('fields', 'head')): value for key, value in model.state_dict().items()}
    again = timm.create_model('test_apvit', num_patches=9).eval()
    again.load_state_dict(former)
    x = images(*SQUARE)
    for each in (again, create(saved(former, tmp_path), num_patches=9)):
        assert torch.equal(each(x), model(x))


CHANGES = {
    'nothing': lambda model: None,
    'num_patches': lambda model: model.set_num_patches(23),
    'default_num_patches': lambda model: model.set_num_patches(None),
    'input_size': lambda model: model.set_input_size((96, 128)),
    'head': lambda model: model.reset_classifier(7, 'avg'),
    'no_head': lambda model: model.reset_classifier(0),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize(
    'kwargs',
    [
        {'transform': 'translation', 'max_shift': 0.3, 'jitter': 0.2},
        {'transform': 'affine', 'max_zoom': 3.0, 'max_rotation': 20.0, 'max_shear': 0.2, 'num_patches': (4, 6)},
        {'transform': 'projective', 'max_perspective': 0.5, 'num_patches': 17},
        {'transform': 'tps', 'max_warp': 0.1},
        {'in_chans': 5, 'num_patches': 17},
        {'patch_size': 8, 'img_size': (64, 48), 'reg_tokens': 2, 'no_embed_class': True, 'init_values': 0.1},
        {'dynamic_img_size': False, 'img_size': 96, 'global_pool': 'avg'},
    ],
)
def test_saved_model_comes_back_bit_for_bit(kwargs, change, tmp_path):
    model = timm.create_model('test_apvit', **kwargs)
    CHANGES[change](model)
    timm_apvit.save_pretrained(randomise(model, std=0.1).eval(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'model.safetensors'}
    models = [timm.create_model(f'local-dir:{tmp_path}', pretrained=True)]
    assert models[0].num_patches == model.num_patches
    if change == 'nothing':  # The calls that load a plain ViT load this, too.
        file = tmp_path / 'model.safetensors'
        models += [create(file, **kwargs), timm.create_model('test_apvit', checkpoint_path=str(file), **kwargs)]
    for train, shape in ((False, model.patch_embed.img_size), (True, (80, 112))):
        x = images(2, kwargs.get('in_chans', 3), *shape)
        with torch.random.fork_rng():
            outputs = [each.train(train)(x) for each in (model, *models) if torch.manual_seed(0)]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_state_dict_of_a_vit_loads_strictly_and_leaves_our_own_parameters(vit):
    model, state = adaptive(), vit.state_dict()
    keys, before = list(state), {key: value.clone() for key, value in model.state_dict().items()}
    assert str(model.load_state_dict(state)) == '<All keys matched successfully>'
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(ADAPTIVE_KEYS) else state[key])
    assert list(state) == keys
    other = adaptive(seed=2).state_dict()
    model.load_state_dict(other)
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('wide', timm_apvit.TRANSFORMS)
@pytest.mark.parametrize('narrow', timm_apvit.TRANSFORMS)
def test_checkpoint_of_a_narrower_family_is_widened_and_of_another_refused(narrow, wide, tmp_path):
    has, wants = set(timm_apvit.TRANSFORMS[narrow].fields), set(timm_apvit.TRANSFORMS[wide].fields)
    model = adaptive(transform=narrow)
    file = saved(model.state_dict(), tmp_path)
    if has <= wants:
        again = create(file, transform=wide)
        assert_equal_up_to_rounding(again(images(*SQUARE)), model(images(*SQUARE)))
        assert {name for name in wants if not again.state_dict()[f'{FIELDS}{name}.weight'].any()} == wants - has
        return
    names = '|'.join(re.escape(FIELDS + name) for name in has - wants)
    for kwargs in ({}, MODES['classes'], MODES['features']):
        with pytest.raises(REFUSED, match=names):
            create(file, transform=wide, **kwargs)
    with pytest.raises(REFUSED, match=names):
        timm.create_model('test_apvit', transform=wide).load_state_dict(model.state_dict())


def test_apvit_checkpoint_adapts_to_other_channels(tmp_path):
    model, x = adaptive(), images(*SQUARE)
    file = saved(model.state_dict(), tmp_path)
    assert_equal_up_to_rounding(create(file, in_chans=6)(torch.cat([x, x], dim=1)), model(x))
    grey = x[:, :1]
    assert_equal_up_to_rounding(create(file, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize('in_chans', [1, 3, 4])
@pytest.mark.parametrize('source', ['test_vit', 'test_apvit'])
def test_rejects_a_checkpoint_of_channels_that_do_not_adapt(source, in_chans, tmp_path):
    file = saved(timm.create_model(source, in_chans=5).state_dict(), tmp_path)
    with pytest.raises(REFUSED, match=r'patch_embed\.proj|localizer\.stem'):
        create(file, in_chans=in_chans)


WRONG = [
    ('missing', 'blocks.3.attn.qkv.weight'),
    ('missing', 'blocks.'),
    ('missing', 'patch_embed.proj.weight'),
    ('missing', 'pos_embed'),
    ('unexpected', 'blocks.6.norm1.weight'),
    ('unexpected', FIELDS + 'swirl.weight'),
    ('unexpected', 'head.junk'),
    ('missing', 'head.weight'),
    ('misshapen', 'blocks.2.mlp.fc1.bias'),
    ('misshapen', 'patch_embed.proj.weight'),
]
WRONG_ADAPTIVE = [
    ('missing', 'patch_embed.geometry_embed.weight'),
    ('missing', 'patch_embed.patching.localizer.stem.0.0.weight'),
    ('missing', FIELDS + 'shift.bias'),
    ('misshapen', 'patch_embed.geometry_embed.bias'),
    ('misshapen', 'patch_embed.patching.localizer.stem.0.0.weight'),
    ('misshapen', FIELDS + 'shift.weight'),
]
CASES = [('test_vit', *case) for case in WRONG] + [('test_apvit', *case) for case in WRONG[:1] + WRONG_ADAPTIVE]
CASES += [('vit_tiny_patch16_224', 'another size', 'blocks.10.'), ('test_vit', 'junk', 'junk')]


@each_mode
@pytest.mark.parametrize(('source', 'spoil', 'key'), CASES)
def test_rejects_a_wrong_checkpoint_by_the_name_of_the_key(source, spoil, key, kwargs, tmp_path):
    state = timm.create_model(source).state_dict()
    if spoil == 'missing':
        state = {name: value for name, value in state.items() if not name.startswith(key)}
    elif spoil == 'misshapen':
        state[key] = torch.cat([state[key], state[key][:1]])
    elif spoil != 'another size':
        state = (state if spoil == 'unexpected' else {}) | {key: torch.zeros(64)}
    file = saved(state, tmp_path)
    if key == 'head.weight' and {'num_classes', 'features_only'} & kwargs.keys():
        create(file, **kwargs)  # wants no head of the checkpoint's
        return
    with pytest.raises(REFUSED, match=re.escape(key)):
        create(file, **kwargs)
    if not kwargs:
        with pytest.raises(REFUSED, match=re.escape(key)):
            timm.create_model('test_apvit', checkpoint_path=str(file))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # numpy's, for half a zip file
@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'npz'])
@pytest.mark.parametrize('size', ['half', 'none', 'gone'])
def test_rejects_a_broken_file(kind, size, files, tmp_path):
    file = tmp_path / files[kind].name
    if size != 'gone':
        content = files[kind].read_bytes()
        file.write_bytes(content[: len(content) // 2] if size == 'half' else b'')
    errors = (RuntimeError, ValueError, OSError, EOFError, SafetensorError, zipfile.BadZipFile)
    for load in (create, lambda path: timm.create_model('test_apvit', checkpoint_path=str(path))):
        with pytest.raises(FileNotFoundError if size == 'gone' else errors):
            load(file)


@each_mode
@pytest.mark.parametrize(('layer', 'scale'), [(3, None), (3, np.ones(1)), (6, np.ones(64))])
def test_rejects_a_wrong_npz_by_the_name_of_the_key(layer, scale, kwargs, vit, tmp_path):
    key = f'Transformer/encoderblock_{layer}/LayerNorm_0/scale'
    arrays = {name: array for name, array in (jax_arrays(vit) | {key: scale}).items() if array is not None}
    np.savez(tmp_path / 'wrong.npz', **arrays)
    with pytest.raises(REFUSED, match=re.escape(key)):
        create(tmp_path / 'wrong.npz', **kwargs)


@pytest.mark.parametrize('mode', ['same', 'grey'])
def test_rejects_an_npz_with_another_head(mode, vit, tmp_path):
    np.savez(tmp_path / 'wrong.npz', **(jax_arrays(vit) | {'head/bias': np.ones(9), 'head/kernel': np.ones((64, 9))}))
    with pytest.raises(REFUSED, match='head'):
        create(tmp_path / 'wrong.npz', **MODES[mode])
