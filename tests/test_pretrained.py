"""Pretrained weights reach a model by every route that timm has, and a wrong checkpoint never does."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import timm_apvit

OWN = ('patch_embed.patching.localizer.', 'patch_embed.geometry_embed.')
HEAD = 'patch_embed.patching.localizer.head.'
# A family's fields, narrow to wide.
FIELDS = {
    'translation': {'shift'},
    'scale': {'shift', 'scale'},
    'anisotropic_scale': {'shift', 'scale', 'aspect'},
    'similarity': {'shift', 'scale', 'rotation'},
    'affine': {'shift', 'scale', 'aspect', 'rotation', 'shear'},
}
# Every way to adapt a checkpoint in which timm may load less strictly.
MODES = {
    'same': {},
    'budget': {'num_patches': 7},
    'classes': {'num_classes': 7},
    'no_classes': {'num_classes': 0},
    'grey': {'in_chans': 1},
    'channels': {'in_chans': 6},
    'size': {'img_size': [96, 128]},
    'features': {'features_only': True, 'out_indices': [2, 5]},
}
SQUARE = (2, 3, 160, 160)


def randomize(model, seed=0):
    """Move every parameter off its initial value; the model, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def adaptive(seed=0, **kwargs):
    """A small model whose patches have moved."""
    return randomize(timm.create_model('test_apvit', **kwargs), seed)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def create(file, name='test_apvit', **kwargs):
    """Create a pretrained model from a file, by timm's own means."""
    overlay = {'file': str(file), 'custom_load': Path(file).suffix == '.npz'}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def saved(state_dict, folder):
    save_file(state_dict, folder / 'model.safetensors')
    return folder / 'model.safetensors'


def assert_equal_up_to_rounding(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


def jax_arrays(vit):
    """The arrays of a ViT in the layout of Google's .npz files: what timm's ``load_pretrained`` reads."""
    state = {key: value.numpy() for key, value in vit.state_dict().items()}
    heads = vit.blocks[0].attn.num_heads
    arrays = {
        'embedding/kernel': state['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
        'embedding/bias': state['patch_embed.proj.bias'],
        'cls': state['cls_token'],
        'Transformer/posembed_input/pos_embedding': state['pos_embed'],
        'Transformer/encoder_norm/scale': state['norm.weight'],
        'Transformer/encoder_norm/bias': state['norm.bias'],
        'head/kernel': state['head.weight'].T,
        'head/bias': state['head.bias'],
    }
    for i in range(len(vit.blocks)):
        ours, theirs = f'blocks.{i}.', f'Transformer/encoderblock_{i}/'
        for norm, layer_norm in (('norm1', 0), ('norm2', 2)):
            arrays[f'{theirs}LayerNorm_{layer_norm}/scale'] = state[f'{ours}{norm}.weight']
            arrays[f'{theirs}LayerNorm_{layer_norm}/bias'] = state[f'{ours}{norm}.bias']
        attention = f'{theirs}MultiHeadDotProductAttention_1/'
        weights, biases = (np.split(state[f'{ours}attn.qkv.{kind}'], 3) for kind in ('weight', 'bias'))
        for part, weight, bias in zip(('query', 'key', 'value'), weights, biases, strict=True):
            arrays[f'{attention}{part}/kernel'] = weight.T.reshape(weight.shape[1], heads, -1)
            arrays[f'{attention}{part}/bias'] = bias.reshape(heads, -1)
        out = state[f'{ours}attn.proj.weight']
        arrays[f'{attention}out/kernel'] = out.T.reshape(heads, -1, out.shape[0])
        arrays[f'{attention}out/bias'] = state[f'{ours}attn.proj.bias']
        for layer in range(2):
            arrays[f'{theirs}MlpBlock_3/Dense_{layer}/kernel'] = state[f'{ours}mlp.fc{layer + 1}.weight'].T
            arrays[f'{theirs}MlpBlock_3/Dense_{layer}/bias'] = state[f'{ours}mlp.fc{layer + 1}.bias']
    return arrays


@pytest.fixture(scope='module')
def vit():
    return randomize(timm.create_model('test_vit'))


@pytest.fixture(scope='module')
def files(vit, tmp_path_factory):
    """One ViT in every format."""
    folder = tmp_path_factory.mktemp('vit')
    state = vit.state_dict()
    torch.save(state, folder / 'vit.pth')
    torch.save({'epoch': 3, 'state_dict': {f'module.{key}': state[key] for key in state}}, folder / 'train.pth.tar')
    np.savez(folder / 'vit.npz', **jax_arrays(vit))
    return {'safetensors': saved(state, folder)} | {path.suffix[1:]: path for path in folder.glob('*.[pnt]*')}


@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'tar', 'npz'])
def test_file_of_a_vit_gives_the_vit(kind, files, vit):
    x = images(*SQUARE)
    assert_equal_up_to_rounding(timm.create_model('test_vit', checkpoint_path=str(files['npz'])).eval()(x), vit(x))
    assert_equal_up_to_rounding(create(files[kind])(x), vit(x))
    assert_equal_up_to_rounding(timm.create_model('test_apvit', checkpoint_path=str(files[kind])).eval()(x), vit(x))


@pytest.mark.parametrize('kwargs', MODES.values(), ids=MODES)
def test_npz_adapts_as_timm_does(kwargs, files):
    if kwargs == MODES['budget']:
        expected, x = create(files['safetensors'], **kwargs), images(*SQUARE)
    else:
        x = images(2, kwargs.get('in_chans', 3), *kwargs.get('img_size', (160, 160)))
        expected = create(files['npz'], 'test_vit', **kwargs)
    actual = create(files['npz'], **kwargs)
    if 'num_classes' in kwargs or 'features_only' in kwargs:
        expected, actual = (getattr(model, 'model', model).forward_features for model in (expected, actual))
    assert_equal_up_to_rounding(actual(x), expected(x))


def test_local_directory_of_a_vit_gives_the_vit(files, vit, tmp_path):
    saved(load_file(files['safetensors']), tmp_path)
    keys = ('input_size', 'fixed_input_size', 'num_classes', 'first_conv', 'classifier')
    cfg = {key: vit.pretrained_cfg[key] for key in keys}
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'test_apvit', 'pretrained_cfg': cfg}))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert_equal_up_to_rounding(model(images(*SQUARE)), vit(images(*SQUARE)))


def test_saved_apvit_loads_by_the_calls_that_load_a_vit(tmp_path):
    model = adaptive()
    timm_apvit.save_pretrained(model, tmp_path)
    file = tmp_path / 'model.safetensors'
    again = (
        create(file),
        timm.create_model('test_apvit', checkpoint_path=str(file)).eval(),
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(),
    )
    for other in again:
        assert torch.equal(other(images(*SQUARE)), model(images(*SQUARE)))
    assert (model(images(*SQUARE)) - create(file, num_patches=99)(images(*SQUARE))).abs().max() > 1e-2


@pytest.mark.parametrize(
    'kwargs',
    [
        {'transform': 'translation', 'max_shift': 0.3, 'jitter': 0.2},
        {'transform': 'affine', 'max_zoom': 3.0, 'max_rotation': 20.0, 'max_shear': 0.2, 'num_patches': (4, 6)},
        {'in_chans': 5, 'num_classes': 3, 'num_patches': 17},
        {'dynamic_img_size': False, 'strict_img_size': False, 'img_size': 96, 'global_pool': 'avg'},
    ],
)
@pytest.mark.parametrize('change', ['nothing', 'num_patches', 'num_patches_default', 'input_size', 'head', 'no_head'])
def test_saved_model_comes_back_bit_for_bit(kwargs, change, tmp_path):
    model = timm.create_model('test_apvit', **kwargs)
    if change == 'num_patches':
        model.set_num_patches(23)
    elif change == 'num_patches_default':
        model.set_num_patches(None)
    elif change == 'input_size':
        model.set_input_size((96, 128))
    elif change == 'head':
        model.reset_classifier(7, 'avg')
    elif change == 'no_head':
        model.reset_classifier(0)
    timm_apvit.save_pretrained(randomize(model), tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    x = images(2, kwargs.get('in_chans', 3), *model.patch_embed.img_size)
    assert again.num_patches == model.num_patches
    for train in (False, True):
        results = []
        for each in (model, again):
            torch.manual_seed(0)
            results.append(each.train(train)(x))
        assert torch.equal(*results)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'test_apvit'
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in ('.bin', '.pth', '.pt')]


def test_state_dict_of_a_vit_loads_strictly_and_leaves_our_own_parameters(vit):
    model, state = adaptive(), vit.state_dict()
    before, keys = {key: value.clone() for key, value in model.state_dict().items()}, list(state)
    assert str(model.load_state_dict(state)) == '<All keys matched successfully>'
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(OWN) else state[key])
    assert list(state) == keys
    other = adaptive(seed=2).state_dict()
    model.load_state_dict(other)
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('wide', FIELDS)
@pytest.mark.parametrize('narrow', FIELDS)
def test_checkpoint_of_a_narrower_family_is_widened_and_of_another_refused(narrow, wide, tmp_path):
    model = adaptive(transform=narrow)
    file = saved(model.state_dict(), tmp_path)
    extra = FIELDS[narrow] - FIELDS[wide]
    if extra:
        names = '|'.join(re.escape(HEAD + name) for name in extra)
        for kwargs in ({}, MODES['classes'], MODES['features']):
            with pytest.raises(RuntimeError, match=names):
                create(file, transform=wide, **kwargs)
        with pytest.raises(RuntimeError, match=names):
            timm.create_model('test_apvit', transform=wide).load_state_dict(model.state_dict())
        return
    again = create(file, transform=wide)
    assert_equal_up_to_rounding(again(images(*SQUARE)), model(images(*SQUARE)))
    zero = {name for name in FIELDS[wide] if not again.state_dict()[f'{HEAD}{name}.weight'].any()}
    assert zero == FIELDS[wide] - FIELDS[narrow]


def test_apvit_checkpoint_adapts_to_other_channels(tmp_path):
    model, x = adaptive(), images(*SQUARE)
    file = saved(model.state_dict(), tmp_path)
    assert_equal_up_to_rounding(create(file, in_chans=6)(torch.cat([x, x], dim=1)), model(x))
    grey = x[:, :1]
    assert_equal_up_to_rounding(create(file, in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)))


def remove(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def add(key):
    return lambda state: state | {key: torch.zeros(64)}


def lengthen(key):
    return lambda state: state | {key: torch.cat([state[key], state[key][:1]])}


WRONG = {
    'missing': ('blocks.3.attn.qkv.weight', remove),
    'missing_stem': ('patch_embed.proj.weight', remove),
    'missing_position': ('pos_embed', remove),
    'unexpected': ('blocks.6.norm1.weight', add),
    'unexpected_own': (HEAD + 'swirl.weight', add),
    'misshapen': ('blocks.2.mlp.fc1.bias', lengthen),
    'misshapen_stem': ('patch_embed.proj.weight', lengthen),
}
WRONG_OWN = {
    'missing': ('patch_embed.geometry_embed.weight', remove),
    'missing_stem': ('patch_embed.patching.localizer.stem.0.0.weight', remove),
    'misshapen': ('patch_embed.geometry_embed.bias', lengthen),
    'misshapen_stem': ('patch_embed.patching.localizer.stem.0.0.weight', lengthen),
    'misshapen_head': (HEAD + 'shift.weight', lengthen),
    'half_a_head': (HEAD + 'shift.bias', remove),
}
CASES = [(source, *case) for source in ('vit', 'apvit') for case in WRONG.values()]
CASES += [('apvit', *case) for case in WRONG_OWN.values()]


@pytest.mark.parametrize('kwargs', MODES.values(), ids=MODES)
@pytest.mark.parametrize(('source', 'key', 'spoil'), CASES)
def test_rejects_a_wrong_checkpoint_by_the_name_of_the_key(source, key, spoil, kwargs, vit, tmp_path):
    state = (vit if source == 'vit' else timm.create_model('test_apvit')).state_dict()
    file = saved(spoil(key)(state), tmp_path)
    with pytest.raises((RuntimeError, ValueError, KeyError), match=re.escape(key)):
        create(file, **kwargs)
    if not kwargs:
        with pytest.raises(RuntimeError, match=re.escape(key)):
            timm.create_model('test_apvit', checkpoint_path=str(file))


@pytest.mark.parametrize('mode', MODES)
def test_rejects_a_checkpoint_without_a_head_only_where_one_is_wanted(mode, vit, tmp_path):
    file = saved({key: value for key, value in vit.state_dict().items() if not key.startswith('head.')}, tmp_path)
    if {'num_classes', 'features_only'} & MODES[mode].keys():
        create(file, **MODES[mode])
    else:
        with pytest.raises(RuntimeError, match=re.escape('head.weight')):
            create(file, **MODES[mode])


@pytest.mark.parametrize('kwargs', MODES.values(), ids=MODES)
@pytest.mark.parametrize('content', ['another size', 'junk', 'empty'])
def test_rejects_a_foreign_checkpoint(content, kwargs, tmp_path):
    state = {'junk': torch.zeros(1)} if content == 'junk' else {}
    if content == 'another size':
        state = timm.create_model('vit_tiny_patch16_224').state_dict()
    with pytest.raises((RuntimeError, ValueError, KeyError), match=r'junk|cls_token|patch_embed\.proj\.weight'):
        create(saved(state, tmp_path), **kwargs)


@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'npz'])
@pytest.mark.parametrize('size', ['half', 'none', 'gone'])
def test_rejects_a_broken_file(kind, size, files, tmp_path):
    file = tmp_path / files[kind].name
    if size != 'gone':
        content = files[kind].read_bytes()
        file.write_bytes(content[: len(content) // 2] if size == 'half' else b'')
    errors = (RuntimeError, ValueError, OSError, EOFError, SafetensorError, zipfile.BadZipFile)
    with pytest.raises(FileNotFoundError if size == 'gone' else errors):
        create(file)
    with pytest.raises(FileNotFoundError if size == 'gone' else errors):
        timm.create_model('test_apvit', checkpoint_path=str(file))


@pytest.mark.parametrize('kwargs', MODES.values(), ids=MODES)
@pytest.mark.parametrize('spoil', ['missing', 'unexpected', 'misshapen', 'head'])
def test_rejects_a_wrong_npz_by_the_name_of_the_key(spoil, kwargs, vit, tmp_path):
    arrays, key = jax_arrays(vit), 'Transformer/encoderblock_3/LayerNorm_0/scale'
    if spoil == 'missing':
        del arrays[key]
    elif spoil == 'misshapen':
        arrays[key] = arrays[key][:1]
    elif spoil == 'unexpected':
        key = 'Transformer/encoderblock_6/LayerNorm_0/scale'
        arrays[key] = arrays['Transformer/encoderblock_5/LayerNorm_0/scale']
    elif {'num_classes', 'features_only'} & kwargs.keys():
        pytest.skip('has no head to load')
    else:
        key, arrays['head/bias'] = 'head', arrays['head/bias'][:-1]
    np.savez(tmp_path / 'wrong.npz', **arrays)
    with pytest.raises((RuntimeError, ValueError, KeyError), match=re.escape(key)):
        create(tmp_path / 'wrong.npz', **kwargs)
