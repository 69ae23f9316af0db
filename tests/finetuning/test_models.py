"""Models to fine-tune: whose classes their weights know."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_apvit
from timm_apvit.finetuning.models import classes_of_checkpoint, start_model, with_images
from timm_apvit.finetuning.settings import Settings
from timm_apvit.pictures.images import image_config

BASE = Settings(model='test_apvit', img_size=32, model_kwargs={'depth': 1})


@pytest.fixture
def vit() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model('test_vit', img_size=32, depth=1, num_classes=7)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_classifier_of_as_many_classes_is_kept_and_another_is_made_anew(
    suffix: str, vit: torch.nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / f'vit.{suffix}'
    if suffix == 'pth':
        torch.save({'state_dict': vit.state_dict()}, path)
    else:
        save_file(vit.state_dict(), path)
    assert classes_of_checkpoint(str(path)) == 7
    options = replace(BASE, checkpoint=str(path))
    kept = start_model(options, 7)
    assert kept.knows_classes
    used = 'images are normalised by mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5, as test_apvit has them (--mean, --std)'
    assert kept.notes == (used,)
    assert start_model(replace(options, mean=[0.1], std=[0.2]), 7).notes == ()
    assert torch.equal(kept.model.head.weight, vit.state_dict()['head.weight'])
    fresh = start_model(options, 5)
    assert not fresh.knows_classes
    assert fresh.notes == ('the classifier starts anew: that of the weights has 7 classes, the data have 5', used)
    assert fresh.model.head.weight.shape == (5, 64)
    assert torch.equal(fresh.model.blocks[0].mlp.fc1.weight, vit.state_dict()['blocks.0.mlp.fc1.weight'])


def test_weights_without_a_classifier(vit: torch.nn.Module, tmp_path: Path) -> None:
    vit.reset_classifier(0)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    started = start_model(replace(BASE, checkpoint=str(tmp_path / 'vit.safetensors')), 5)
    assert not started.knows_classes
    assert 'that of the weights is none, the data have 5' in started.notes[0]


def test_saved_model_knows_its_classes(tmp_path: Path) -> None:
    model = timm.create_model('test_apvit', img_size=32, depth=1, num_classes=4)
    timm_apvit.save_pretrained(model, tmp_path / 'saved')
    options = Settings(model=f'local-dir:{tmp_path / "saved"}', pretrained=True)
    kept = start_model(options, 4)
    assert kept.knows_classes
    assert torch.equal(kept.model.head.weight, model.head.weight)
    assert 'has 4 classes, the data have 6' in start_model(options, 6).notes[0]
    untrained = start_model(replace(options, pretrained=False), 4)
    assert untrained.notes == (f'the model starts untrained; --pretrained takes the weights of {options.model}',)


def test_weights_one_level_deeper_are_named_by_their_key(vit: torch.nn.Module, tmp_path: Path) -> None:
    torch.save({'teacher': vit.state_dict(), 'epoch': 3}, tmp_path / 'dino.pth')
    with pytest.raises(ValueError, match="one level deeper, under 'teacher': save one of these"):
        classes_of_checkpoint(str(tmp_path / 'dino.pth'))


def test_weights_of_another_width_are_refused_by_key_and_shapes(tmp_path: Path) -> None:
    wider = timm.create_model('test_vit', img_size=32, depth=1, embed_dim=128)
    save_file(wider.state_dict(), tmp_path / 'wider.safetensors')
    with pytest.raises(ValueError, match=r'size mismatch for cls_token: .*\[1, 1, 128\].*\[1, 1, 64\]'):
        start_model(replace(BASE, checkpoint=str(tmp_path / 'wider.safetensors')), 5)


def test_mean_and_std_are_those_given_and_saved(tmp_path: Path) -> None:
    settings = replace(BASE, mean=[0.1], std=[0.2, 0.3, 0.4], crop_pct=0.5)
    model = with_images(start_model(settings, 5).model, settings)
    timm_apvit.save_pretrained(model, tmp_path / 'saved')
    config = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).pretrained_cfg
    assert [list(config['mean']), list(config['std']), config['crop_pct']] == [[0.1] * 3, [0.2, 0.3, 0.4], 0.5]


def test_weights_of_another_vit_are_told(tmp_path: Path) -> None:
    vit = timm.create_model('test_vit', img_size=28, patch_size=14, depth=1)
    save_file({f'module.{key}': value for key, value in vit.state_dict().items()}, tmp_path / 'fine.safetensors')
    assert classes_of_checkpoint(str(tmp_path / 'fine.safetensors')) == 1000
    notes = start_model(replace(BASE, checkpoint=str(tmp_path / 'fine.safetensors')), 5).notes
    assert 'the weights are of patches of 14 x 14 pixels, resampled to 16 x 16: is it their model?' in notes
    for options, hint in (({'init_values': 1e-5}, 'has LayerScale: take'), ({'reg_tokens': 2}, 'has registers: take')):
        vit = timm.create_model('test_vit', img_size=32, depth=1, **options)
        save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
        with pytest.raises(ValueError, match=hint):
            start_model(replace(BASE, checkpoint=str(tmp_path / 'vit.safetensors')), 5)


def test_an_overlay_is_kept_beside_the_weights_of_a_file(vit: torch.nn.Module, tmp_path: Path) -> None:
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    overlay = {'pretrained_cfg_overlay': {'mean': (0.1, 0.2, 0.3)}, 'depth': 1}
    settings = replace(BASE, checkpoint=str(tmp_path / 'vit.safetensors'), model_kwargs=overlay)
    model = start_model(settings, 7).model
    assert image_config(model)['mean'] == (0.1, 0.2, 0.3)
    timm_apvit.save_pretrained(model, tmp_path / 'saved')
    config = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).pretrained_cfg
    assert tuple(config['mean']) == (0.1, 0.2, 0.3)


def test_weights_of_a_larger_transform_fit_where_it_does_nothing_and_say_its_name(tmp_path: Path) -> None:
    larger = timm.create_model('test_apvit', img_size=32, depth=1, transform='affine', num_classes=7)
    settings = replace(BASE, transform='translation', checkpoint=str(tmp_path / 'larger.safetensors'))
    save_file(larger.state_dict(), tmp_path / 'larger.safetensors')
    assert start_model(settings, 7).model.patch_embed.patching.transform.fields == {'shift': 2}
    with torch.no_grad():
        larger.patch_embed.patching.localizer.fields['rotation'].weight[0, 0] = 1.0
    save_file(larger.state_dict(), tmp_path / 'larger.safetensors')
    message = r"of a larger transform such as transform='similarity' or 'affine' .*, and its rotation is not zero"
    with pytest.raises(ValueError, match=message):
        start_model(settings, 7)
