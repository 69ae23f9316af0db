"""From a built ViT to an APViT and back, names of twins, and what is refused on the way."""

import subprocess
import sys

import pytest
import timm
import torch
from conftest import create, images
from torch import nn

import timm_apvit
from timm_apvit.models.checkpoint import ADAPTIVE_KEYS
from timm_apvit.models.vits import ADAPTIVE_CLASSES


class Wrapper(nn.Module):
    """What a library wraps a model in."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Other(timm.models.VisionTransformer):
    """A class that a user derived."""


def meta():
    with torch.device('meta'):
        return timm.create_model('test_vit')


def quantised():
    return torch.ao.quantization.quantize_dynamic(timm.create_model('test_vit'), {nn.Linear})


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:torch.quantize_per_tensor')
@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: timm.create_model('resnet18'), 'got ResNet'),
        (lambda: timm.create_model('test_apvit'), 'got an APViT'),
        (lambda: torch.compile(timm.create_model('test_vit')), 'got OptimizedModule; give its model._orig_mod'),
        (lambda: Wrapper(timm.create_model('test_vit')), 'got Wrapper; give its model.module'),
        (lambda: Other(depth=1, embed_dim=64, num_heads=2), 'got Other'),
        (meta, 'on the meta device'),
        (quantised, 'a quantised one'),
        (lambda: timm.create_model('beit_base_patch16_224', depth=1), 'got Beit'),
        (lambda: timm.create_model('vit_tiny_r_s16_p8_224'), 'one whose patch_embed is HybridEmbed'),
        (lambda: 'vit_tiny_patch16_224', 'got str'),
    ],
)
def test_rejects_what_cannot_be_adapted(make, message):
    with pytest.raises(ValueError, match=message):
        timm_apvit.adapt(make())


def test_rejects_arguments_and_leaves_the_vit_alone():
    vit = timm.create_model('test_vit')
    known = repr(vit)
    for arguments, error, message in [
        ({'num_patchse': 3}, TypeError, 'num_patchse'),
        ({'num_patches': 0}, ValueError, 'expected num_patches'),
        ({'transform': 'bend'}, ValueError, 'expected transform'),
        ({'localizer': 'resnet'}, ValueError, 'expected localizer'),
        ({'max_zoom': 0.1}, ValueError, 'expected max_zoom'),
    ]:
        with pytest.raises(error, match=message):
            timm_apvit.adapt(vit, **arguments)
    assert repr(vit) == known
    assert type(vit) in ADAPTIVE_CLASSES
    with pytest.raises(ValueError, match='expected an APViT, got VisionTransformer'):
        timm_apvit.vit_of(vit)


def test_saving_refuses_what_no_entrypoint_rebuilds(tmp_path):
    vit = timm.models.VisionTransformer(depth=1, embed_dim=64, num_heads=2)
    with pytest.raises(ValueError, match='expected a model that timm'):
        timm_apvit.save_pretrained(timm_apvit.adapt(vit), tmp_path)
    model = timm.create_model('test_apvit')
    model.blocks[2].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match=r"got one with '\(act\): ReLU\(\)' where that has .\(act\): GELU"):
        timm_apvit.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match='can hold, got act_layer='):
        timm_apvit.save_pretrained(timm.create_model('test_apvit', act_layer=nn.ReLU), tmp_path)
    assert list(tmp_path.iterdir()) == []
    named = timm_apvit.adapt(timm.create_model('test_vit', act_layer='relu', reg_tokens=2, drop_path_rate=0.1))
    timm_apvit.save_pretrained(named, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert type(again.blocks[0].mlp.act) is nn.ReLU
    assert again.reg_token.shape[1] == 2


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('beit_base_patch16_224', 'a bias for each pair of cells'),
        ('vit_tiny_r_s16_p8_224', 'a CNN makes its tokens'),
        ('vitamin_small_224', 'a CNN makes its tokens'),
        ('naflexvit_base_patch16_gap', 'take the twin of the ViT with the same weights'),
        ('swin_tiny_patch4_window7_224', 'attends within windows'),
        ('resnet18', 'none of VisionTransformer, VisionTransformerDistilled and Eva'),
        ('vit_tiny_patch16_224_in21k', 'timm has it under another name'),
        ('apvit_small', 'it is adaptive already'),
        ('vit_huge', 'timm has no such model'),
    ],
)
@pytest.mark.filterwarnings('ignore:Mapping deprecated model name')
def test_names_without_a_twin_say_why(name, message):
    with pytest.raises(ValueError, match=message):
        timm_apvit.twin_name(name)
    if 'timm has' not in message and 'adaptive' not in message:
        twin = f'apvit_{name.removeprefix("vit_")}'
        assert twin not in timm.list_models('*')
        if name != 'resnet18':
            for ask in (timm_apvit.vit_name, timm.create_model):
                with pytest.raises(ValueError, match=message):
                    ask(twin)


def test_names_go_both_ways():
    for name in ('vit_small_patch14_dinov2', 'eva02_base_patch14_224', 'deit3_base_patch16_224', 'test_vit2'):
        assert timm_apvit.vit_name(timm_apvit.twin_name(name)) == name
    assert timm_apvit.twin_name('vit_small_patch14_dinov2.lvd142m') == 'apvit_small_patch14_dinov2.lvd142m'
    assert timm_apvit.vit_name('apvit_small.dino') == 'vit_small_patch16_224.dino'
    assert timm_apvit.twin_name('vit_small_patch16_224') == 'apvit_small_patch16_224'
    assert not [key for key in timm.create_model('test_vit').state_dict() if key.startswith(ADAPTIVE_KEYS)]


@pytest.mark.parametrize('norm', [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.weight_norm])
def test_what_is_attached_to_the_projection_takes_part(norm):
    model, seen = create(num_patches=4), []
    norm(model.patch_embed.proj)
    model.patch_embed.proj.register_forward_hook(lambda *_: seen.append(1))
    model.train()(images(2, 3, 64, 64)).square().sum().backward()
    learned = [p for name, p in model.patch_embed.proj.named_parameters() if name != 'bias']
    assert all(p.grad is not None for p in learned)
    assert seen == [1]


def test_rejects_hooks_that_would_be_lost_and_shared_weights(tmp_path):
    vit = timm.create_model('test_vit')
    vit.patch_embed.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match='without hooks on its patch_embed'):
        timm_apvit.adapt(vit)
    shared = timm_apvit.adapt(timm.create_model('test_vit'))
    shared.blocks[1].mlp.fc1.weight = shared.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match='expected weights that safetensors can hold'):
        timm_apvit.save_pretrained(shared, tmp_path)


@pytest.mark.parametrize('feature_cls', ['hook', 'fx', 'getter'])
def test_features_of_every_kind_that_timm_makes(feature_cls):
    for name in ('test_apvit', 'apvit_eva02_tiny_patch14_224'):
        kwargs = {'features_only': True, 'feature_cls': feature_cls, 'out_indices': (0, 1), 'depth': 2}
        features = timm.create_model(name, img_size=70, **kwargs)(images(1, 3, 70, 70))
        assert len(features) == 2


@pytest.mark.parametrize('name', ['apvit_small', 'apvit_eva02_tiny_patch14_224'])
def test_rejects_naflex_as_it_has_no_adaptive_patches(name, monkeypatch):
    with pytest.raises(ValueError, match='leave use_naflex out, and TIMM_USE_NAFLEX unset'):
        timm.create_model(name, use_naflex=True, depth=1)
    if 'eva' in name:  # the other module reads it when it is imported
        monkeypatch.setenv('TIMM_USE_NAFLEX', '1')
        with pytest.raises(ValueError, match='TIMM_USE_NAFLEX unset'):
            timm.create_model(name, depth=1)


def test_timms_own_saving_keeps_the_adaptive_arguments(tmp_path):
    model = timm_apvit.adapt(timm.create_model('test_vit'), num_patches=9, max_zoom=4.0, transform='affine')
    model.set_num_patches(7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.adaptive_args() == model.adaptive_args()
    assert (again.num_patches, again.adaptive_args()['max_zoom']) == (7, 4.0)


@pytest.mark.slow
def test_another_module_of_the_name_of_timms_is_not_taken_for_it(tmp_path):
    (tmp_path / 'eva.py').write_text(
        'import timm\n\n\n@timm.models.register_model\ndef my_eva(pretrained=False, **kwargs):\n'
        "    return timm.create_model('test_vit')\n"
    )
    program = (
        "import sys; sys.path.insert(0, '.'); import timm, eva, timm_apvit; print(len(timm.list_models('*apvit*')))"
    )
    run = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (run.stderr, run.stdout.strip()) == ('', str(len(timm.list_models('*apvit*'))))
