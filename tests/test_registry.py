"""What timm's registry says of our models is what their ViTs say, and the weights that it names arrive from the Hub."""

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_equal_up_to_rounding, images, randomise
from hub_server import create_models, serve
from safetensors.torch import save
from timm.models import get_arch_pretrained_cfgs, is_model, is_model_pretrained, model_entrypoint
from timm.models.vision_transformer import checkpoint_filter_fn

import timm_apvit
from timm_apvit.models.checkpoint import ADAPTIVE_KEYS

VIT_OF = {
    'apvit_tiny': 'vit_tiny_patch16_224',
    'apvit_small': 'vit_small_patch16_224',
    'apvit_base': 'vit_base_patch16_224',
    'apvit_large': 'vit_large_patch16_224',
    'test_apvit': 'test_vit',
}
each_model = pytest.mark.parametrize(('name', 'vit_name'), VIT_OF.items())

SQUARE = [2, 3, 160, 160]
# Changes that a ViT can follow, each with a checkpoint that has none of them.
ADAPTED = {
    'default': {},
    'classes': {'num_classes': 7},
    'no_classes': {'num_classes': 0},
    'grey': {'in_chans': 1},
    'channels': {'in_chans': 6},
    'size': {'img_size': [96, 128]},
    'features': {'features_only': True, 'out_indices': [2, 5]},
}
WRONG = {'hf_hub_id': 'me/wrong'}
# One of each family, of one block, on its own size of images.
FAMILIES = {
    'vit_small_patch14_reg4_dinov2': (518, 518),
    'vit_base_patch32_clip_quickgelu_224': (224, 224),
    'vit_base_patch16_siglip_224': (224, 224),
    'deit3_small_patch16_224': (224, 224),
    'deit_tiny_distilled_patch16_224': (224, 224),
    'vit_small_patch16_dinov3': (256, 256),
    'eva02_tiny_patch14_224': (224, 224),
    'vit_pe_core_tiny_patch16_384': (384, 384),
    'vit_small_patch16_rope_mixed_224': (224, 224),
}
# One process downloads them all, in this order; the first is broken off half-way, 'default' then repeats it.
CALLS = {
    'cut': ('test_apvit', {}, SQUARE),
    **{
        call: ('test_apvit', kwargs, [2, kwargs.get('in_chans', 3), *kwargs.get('img_size', SQUARE[2:])])
        for call, kwargs in ADAPTED.items()
    },
    'half': ('test_apvit', {'num_patches': [5, 5]}, SQUARE),
    'tag': ('apvit_tiny.augreg_in21k', {}, [1, 3, 224, 224]),
    'absent': ('apvit_tiny', {}, [1, 3, 224, 224]),
    'wrong': ('test_apvit', {'pretrained_cfg_overlay': WRONG}, SQUARE),
    'wrong_adapted': ('test_apvit', {'pretrained_cfg_overlay': WRONG, 'num_classes': 7}, SQUARE),
    'saved': ('hf-hub:me/saved', {}, [2, 3, 96, 128]),
    **{vit: (timm_apvit.twin_name(vit), {'depth': 1}, [1, 3, *size]) for vit, size in FAMILIES.items()},
}

IMPORT = """
import sys, timm

def refuse(event, arguments):
    if event.startswith('socket.'):
        raise RuntimeError(f'expected no network at import, got {event} {arguments}')

before, known = set(timm.list_models()), set(sys.modules)
random_state = __import__('torch').get_rng_state()
sys.addaudithook(refuse)
import timm_apvit
assert (__import__('torch').get_rng_state() == random_state).all()
heavy = {module.partition('.')[0] for module in set(sys.modules) - known} & {'matplotlib', 'sklearn', 'skimage', 'tqdm'}
assert not heavy, heavy
assert before < set(timm.list_models())
new = set(timm.list_models()) - before
assert all(name.startswith(('apvit_', 'test_apvit')) for name in new)
sys.exit(not set(sys.argv[1:]) < new)
"""


def tags(name: str) -> list[str]:
    """Pretrained tags of an architecture, the default one first."""
    return [name_with_tag.partition('.')[2] for name_with_tag in get_arch_pretrained_cfgs(name)]


@pytest.mark.slow
def test_import_registers_the_models_and_does_nothing_else():
    process = subprocess.run(
        [sys.executable, '-W', 'error', '-c', IMPORT, *VIT_OF],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, '', '')


def test_list_models():
    ours = set(timm.list_models('*apvit*'))
    vits = timm.list_models(module=['vision_transformer', 'deit', 'eva'])
    assert ours == {timm_apvit.twin_name(vit) for vit in vits} | VIT_OF.keys()
    assert ours == set(timm.list_models(module='apvit'))
    assert {name.rstrip('234') for name in ours if not name.startswith('apvit_')} == {'test_apvit'}
    assert not ours & set(timm.list_models('vit*'))
    assert timm.list_models('apvit_small_patch14*reg4_dinov2') == ['apvit_small_patch14_reg4_dinov2']


def test_list_pretrained():
    vits = {name: timm_apvit.vit_name(name) for name in timm.list_models('*apvit*')}
    expected = {
        f'{name}.{tag}'
        for name, vit in vits.items()
        for tag in tags(vit)
        if tag and is_model_pretrained(f'{vit}.{tag}')
    }
    assert len(expected) > 400
    assert set(timm.list_pretrained('*apvit*')) == expected
    assert timm.list_pretrained('apvit_small.*dino') == ['apvit_small.dino']
    for name in expected:
        ours, theirs = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(timm_apvit.vit_name(name))
        # Where there is a repository, native checkpoints; a few have an original file alone.
        assert (ours.hf_hub_id, ours.url) == ((theirs.hf_hub_id, None) if theirs.hf_hub_id else (None, theirs.url))
        assert (ours.mean, ours.std, ours.license, ours.input_size) == (
            theirs.mean, theirs.std, theirs.license, theirs.input_size
        )  # fmt: skip


@each_model
def test_tags_are_the_vits_with_its_default_first(name, vit_name):
    assert tags(name) == tags(vit_name)
    assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(vit_name).tag
    assert all(is_model(f'{name}.{tag}') and is_model_pretrained(f'{name}.{tag}') for tag in tags(vit_name))
    assert is_model_pretrained(name)


@each_model
def test_configurations_are_the_vits_but_for_where_weights_lie(name, vit_name):
    for tag in tags(vit_name):
        ours = timm.get_pretrained_cfg(f'{name}.{tag}')
        theirs = timm.get_pretrained_cfg(f'{vit_name}.{tag}')
        assert (ours.architecture, ours.tag) == (name, tag)
        assert ours.hf_hub_id == f'timm/{vit_name}.{tag}'
        assert not ours.url
        assert ours.custom_load is False
        assert (ours.fixed_input_size, ours.first_conv, ours.classifier) == (True, 'patch_embed.proj', 'head')
        ours, theirs = ours.to_dict(remove_source=True), theirs.to_dict(remove_source=True)
        for key in ('architecture', 'custom_load'):
            del ours[key], theirs[key]
        assert ours == theirs


def test_timms_own_configurations_are_untouched():
    assert tags('vit_tiny_patch16_224') == ['augreg_in21k_ft_in1k', 'augreg_in21k']
    for tag in tags('vit_tiny_patch16_224'):
        theirs = timm.get_pretrained_cfg(f'vit_tiny_patch16_224.{tag}')
        assert theirs.architecture == 'vit_tiny_patch16_224'
        assert theirs.custom_load
        assert theirs.url.endswith('.npz')


@each_model
def test_shape_of_every_parameter_is_the_vits(name, vit_name):
    with torch.device('meta'):
        model, vit = timm.create_model(name), timm.create_model(vit_name)
    ours = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(ADAPTIVE_KEYS)}
    assert ours == {key: value.shape for key, value in vit.state_dict().items()}
    assert any(key.startswith(ADAPTIVE_KEYS[0]) for key in model.state_dict())
    for part in ('pos_drop', 'norm_pre', 'blocks', 'norm', 'fc_norm', 'head_drop', 'head'):
        assert repr(getattr(model, part)) == repr(getattr(vit, part))
    for attribute in ('num_classes', 'num_features', 'num_prefix_tokens', 'global_pool', 'dynamic_img_size'):
        assert getattr(model, attribute) == getattr(vit, attribute)
    assert [block.attn.num_heads for block in model.blocks] == [block.attn.num_heads for block in vit.blocks]
    assert [getattr(model.patch_embed, key) for key in ('img_size', 'patch_size', 'grid_size', 'num_patches')] == [
        getattr(vit.patch_embed, key) for key in ('img_size', 'patch_size', 'grid_size', 'num_patches')
    ]


@each_model
def test_entrypoint_is_documented_and_untrained_by_default(name, vit_name):
    entrypoint = model_entrypoint(name)
    assert inspect.getdoc(entrypoint)
    assert inspect.signature(entrypoint).parameters['pretrained'].default is False
    assert entrypoint.__module__ == 'timm_apvit.models.apvit'


@each_model
def test_rejects_an_unknown_keyword_by_name(name, vit_name):
    with torch.device('meta'), pytest.raises(TypeError, match='num_patchse'):
        timm.create_model(name, num_patchse=49)


def test_rejects_an_unknown_tag_by_name():
    with pytest.raises(RuntimeError, match='no_such_tag'):
        timm.create_model('test_apvit.no_such_tag', pretrained=True)


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """The models behind a Hub, the requests it got, and what `CALLS` made of it."""
    folder = tmp_path_factory.mktemp('hub')
    vit, tagged = (
        randomise(timm.create_model(name), std=0.1).eval() for name in ('test_vit', 'vit_tiny_patch16_224.augreg_in21k')
    )
    saved = randomise(
        timm.create_model('test_apvit', transform='affine', num_patches=13, img_size=(96, 128)), std=0.1
    ).eval()
    timm_apvit.save_pretrained(saved, folder / 'saved')
    wrong = {key: value for key, value in vit.state_dict().items() if key != 'blocks.3.norm1.bias'}
    repositories = {
        'timm/test_vit.r160_in1k': {'model.safetensors': save(vit.state_dict())},
        'timm/vit_tiny_patch16_224.augreg_in21k': {'model.safetensors': save(tagged.state_dict())},
        'me/wrong': {'model.safetensors': save(wrong)},
        'me/saved': {path.name: path.read_bytes() for path in (folder / 'saved').iterdir()},
    }
    families = {name: randomise(timm.create_model(name, depth=1)).eval() for name in FAMILIES}
    for name, model in families.items():
        repositories[timm.get_pretrained_cfg(name).hf_hub_id] = {'model.safetensors': save(model.state_dict())}
    with serve(repositories) as server:
        server.truncate_once.add('timm/test_vit.r160_in1k/model.safetensors')
        results = create_models(server, folder / 'home', CALLS)
    return SimpleNamespace(
        vit=vit, tagged=tagged, saved=saved, families=families, requests=server.requests, results=results
    )


@pytest.mark.slow
@pytest.mark.parametrize('call', ADAPTED)
def test_downloaded_model_is_the_vit(call, hub):
    _, kwargs, shape = CALLS[call]
    overlay = {'state_dict': hub.vit.state_dict()}
    expected = timm.create_model('test_vit', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    actual = hub.results[call]
    if call == 'features':
        for ours, theirs in zip(actual['features'], expected(images(*shape)), strict=True):
            assert_equal_up_to_rounding(ours, theirs)
        return
    assert_equal_up_to_rounding(actual['features'], expected.forward_features(images(*shape)))
    if call == 'classes':
        assert actual['logits'].shape == (2, 7)
    else:
        assert_equal_up_to_rounding(actual['logits'], expected(images(*shape)))


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_downloaded_model_of_a_family_is_the_vit(name, hub):
    expected = hub.families[name](images(*CALLS[name][2]))
    assert_equal_up_to_rounding(hub.results[name]['logits'], expected)


@pytest.mark.slow
def test_downloaded_tag_is_its_own_vit(hub):
    assert hub.results['tag']['logits'].shape == (1, 21843)
    assert_equal_up_to_rounding(hub.results['tag']['logits'], hub.tagged(images(1, 3, 224, 224)))


def test_downloaded_half_grid_is_the_vit_on_the_halved_image(hub):
    small = timm.create_model('test_vit', img_size=80).eval()
    small.load_state_dict(checkpoint_filter_fn(hub.vit.state_dict(), small))
    assert_equal_up_to_rounding(hub.results['half']['logits'], small(F.avg_pool2d(images(*SQUARE), 2)))


def test_downloaded_apvit_is_the_one_that_was_saved(hub):
    assert_equal_up_to_rounding(hub.results['saved']['logits'], hub.saved(images(2, 3, 96, 128)))


def test_downloaded_model_knows_its_source(hub):
    sources = {call: result.get('base_model') for call, result in hub.results.items()}
    vit, tagged = 'timm/test_vit.r160_in1k', 'timm/vit_tiny_patch16_224.augreg_in21k'
    assert {sources[name] for name in FAMILIES} == {timm.get_pretrained_cfg(name).hf_hub_id for name in FAMILIES}
    assert {sources[call] for call in ADAPTED if call != 'features'} == {vit}
    assert (sources['half'], sources['tag'], sources['saved']) == (vit, tagged, 'me/saved')


def test_downloads_come_from_the_vits_repositories(hub):
    asked = {request.split('/resolve/')[0].partition(' ')[2] for request in hub.requests}
    vits = {'test_vit.r160_in1k', 'vit_tiny_patch16_224.augreg_in21k', 'vit_tiny_patch16_224.augreg_in21k_ft_in1k'}
    families = {f'/{timm.get_pretrained_cfg(name).hf_hub_id}' for name in FAMILIES}
    assert asked == {f'/timm/{name}' for name in vits} | {'/me/wrong', '/me/saved'} | families


def test_rejects_downloads_that_fail_by_what_failed(hub):
    errors = {call: result['error'] for call, result in hub.results.items() if 'error' in result}
    assert errors.keys() == {'cut', 'absent', 'wrong', 'wrong_adapted'}
    assert 'timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k' in errors['absent']
    assert 'test_vit.r160_in1k' in errors['cut'] or 'r160_in1k/resolve' in errors['cut']
    assert 'blocks.3.norm1.bias' in errors['wrong']
    assert 'blocks.3.norm1.bias' in errors['wrong_adapted']
