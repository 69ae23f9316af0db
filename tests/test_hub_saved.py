"""What may be saved and pushed, and under which names of its classes and of its source."""

import json
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import create
from hub_server import serve
from hub_uploads import WritableHub, front_matter, run_client
from torch import nn

import timm_apvit

NAMES = ['bird', 'cat', 'dog']

# A model that is updated, and one of another repository.
UPDATES = """
import sys
import timm, timm_apvit

def pull(name):
    return timm.create_model(f'hf-hub:{name}', pretrained=True)

first = timm.create_model('local-dir:' + sys.argv[1], pretrained=True)
timm_apvit.push_to_hub(first, 'me/a')
timm_apvit.push_to_hub(pull('me/a'), 'a', overwrite_card=True)
timm_apvit.push_to_hub(pull('me/a'), 'me/b')
timm_apvit.save_pretrained(pull('me/b'), sys.argv[2])
timm_apvit.push_to_hub(sys.argv[2], 'me/b', overwrite_card=True, revision='v2')
scratch = timm.create_model('test_apvit')
timm_apvit.push_to_hub(scratch, 'me/scratch')
timm_apvit.push_to_hub(pull('me/scratch'), 'me/scratch', overwrite_card=True)
timm_apvit.push_to_hub(scratch, 'me/mine', card=timm_apvit.CardDetails(license='mit'))
timm_apvit.push_to_hub(pull('me/mine'), 'me/mine', overwrite_card=True)
assert pull('me/a').base_model == 'me/a'
"""


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved model of three classes."""
    model = create(num_classes=3)
    timm_apvit.save_pretrained(model, tmp_path / 'first', label_names=NAMES)
    return SimpleNamespace(folder=tmp_path, model=model)


@pytest.mark.slow
def test_updated_model_keeps_its_source_and_its_license(tmp_path):
    model = create(num_classes=3)
    model.base_model = 'timm/test_vit.r160_in1k'
    timm_apvit.save_pretrained(model, tmp_path / 'first')
    with serve({}, WritableHub) as server:
        server.tokens = {'hf_mine': ('me', 'write')}
        process = run_client(
            server, tmp_path / 'home', UPDATES, str(tmp_path / 'first'), str(tmp_path / 'b'),
            HF_TOKEN='hf_mine',
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        branch = server.branches['me/b']['v2']
        repositories = {**server.repositories, 'me/b@v2': branch}
    origins = {}
    for name, files in repositories.items():
        card, config = front_matter(files['README.md'].decode()), json.loads(files['config.json'])
        origins[name] = (card.get('base_model'), card.get('license'))
        assert (config.get('base_model'), config['pretrained_cfg'].get('license')) == origins[name]
    assert origins == {
        'me/a': ('timm/test_vit.r160_in1k', 'apache-2.0'),
        'me/b': ('me/a', 'apache-2.0'),
        'me/b@v2': ('me/a', 'apache-2.0'),
        'me/scratch': (None, None),
        'me/mine': (None, 'mit'),
    }
    # An update is no other model than before.
    assert json.loads(repositories['me/a']['config.json'])['num_classes'] == 3


def test_labels_of_other_classes_are_dropped(saved, tmp_path):
    model = timm.create_model(f'local-dir:{saved.folder / "first"}', pretrained=True)
    timm_apvit.save_pretrained(model, tmp_path / 'same')
    assert timm.create_model(f'local-dir:{tmp_path / "same"}', pretrained=True).pretrained_cfg['label_names'] == NAMES
    model.reset_classifier(2)
    timm_apvit.save_pretrained(model, tmp_path / 'other')
    again = timm.create_model(f'local-dir:{tmp_path / "other"}', pretrained=True)
    assert not again.pretrained_cfg.get('label_names')
    assert again.num_classes == 2


def test_rejects_labels_of_other_classes(tmp_path):
    with pytest.raises(ValueError, match='expected names of 1000 classes, got 2'):
        timm_apvit.save_pretrained(create(), tmp_path, label_names=['a', 'b'])
    with pytest.raises(ValueError, match='expected names of 1000 classes, got 2'):
        timm_apvit.push_to_hub(create(), 'me/model', label_names=['a', 'b'])


def test_rejects_another_model_and_says_where_a_wrapped_one_is(tmp_path):
    wrapped = {
        'VisionTransformer': (timm.create_model('test_vit'), ''),
        'OptimizedModule': (torch.compile(create()), '; give its model._orig_mod'),
        'DataParallel': (nn.DataParallel(create()), '; give its model.module'),
        'PeftModel': (
            type('PeftModel', (nn.Module,), {'merge_and_unload': create})(),
            '; give its model.merge_and_unload()',
        ),
        'Wrapper': (type('Wrapper', (nn.Module,), {'timm_model': create()})(), '; give its model.timm_model'),
    }
    for name, (model, way) in wrapped.items():
        for act in (timm_apvit.save_pretrained, timm_apvit.push_to_hub):
            with pytest.raises(ValueError, match=f'^{re.escape(f"expected an APViT, got {name}{way}")}$'):
                act(model, str(tmp_path / 'none/model') if act is timm_apvit.save_pretrained else 'me/model')
    assert not (tmp_path / 'none').exists()


def test_rejects_a_model_without_weights_and_leaves_nothing(tmp_path):
    with torch.device('meta'):
        model = create()
    with pytest.raises(ValueError, match='expected weights, got a model on the meta device'):
        timm_apvit.save_pretrained(model, tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


def test_rejects_a_folder_that_names_other_classes_than_its_head_has(saved):
    """As transformers saves a model whose head was changed."""
    saved.model.reset_classifier(2)
    timm_apvit.save_pretrained(saved.model, saved.folder / 'first')
    file = saved.folder / 'first/config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'label_names': NAMES}))
    with pytest.raises(ValueError, match=r'expected names of 2 classes, got 3: .*config\.json.*label_names=\.\.\.'):
        timm_apvit.push_to_hub(saved.folder / 'first', 'me/model')


def test_labels_by_number_are_saved_in_their_order(saved):
    timm_apvit.save_pretrained(saved.model, saved.folder / 'again', label_names={'2': 'emu', '0': 'owl', '1': 'tit'})
    again = timm.create_model(f'local-dir:{saved.folder / "again"}', pretrained=True)
    assert again.pretrained_cfg['label_names'] == ['owl', 'tit', 'emu']


def test_rejects_folders_that_do_not_load(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'with model\.safetensors'):
        timm_apvit.push_to_hub(tmp_path, 'me/model')
    whole = (saved.folder / 'first/model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'config.json').write_text((saved.folder / 'first/config.json').read_text())
    with pytest.raises(ValueError, match='expected files that load'):
        timm_apvit.push_to_hub(tmp_path, 'me/model')
    with pytest.raises(ValueError, match='expected label_names with a model alone'):
        timm_apvit.push_to_hub(saved.folder / 'first', 'me/model', label_names=NAMES)
