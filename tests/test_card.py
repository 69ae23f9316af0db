"""What a model card says of a model, and that the Hub can read it."""

import math
import re

import pytest
import timm
import torch
import yaml
from conftest import create
from hub_uploads import front_matter, problems_of_card
from huggingface_hub import ModelCard

from timm_apvit import CardDetails
from timm_apvit.hub.card import model_card, with_origin
from timm_apvit.results import results_table

VIT = 'timm/vit_small_patch16_224.augreg_in21k_ft_in1k'
ROWS = [
    {
        'budget': budget,
        'num_patches': number,
        'images': 24,
        'top1': top1,
        'top5': 0.9,
        'loss': 1.25,
        'multiply_adds': number * 1_000_000,
        'images_per_second': {'1': 300.0, '64': 1000.0 / number},
    }
    for budget, number, top1 in (('4', 4, 0.5), ('2x8', 16, 0.625))
]
RESULTS = {'rows': ROWS, 'device': 'a CPU', 'threads': 2, 'versions': {'timm': '1.0'}, 'counted': 'products only'}


def sections(card):
    """The sections of a card by their titles."""
    parts = re.split(r'^## (.*)\n', card, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_front_matter_is_what_the_hub_reads(tmp_path):
    details = CardDetails(
        base_model=VIT, datasets=('me/birds',), results=RESULTS, results_dataset=('me/birds', 'Birds')
    )
    card = model_card(create(num_classes=3), 'me/model', label_names=['a', 'b', 'c'], details=details)
    assert problems_of_card(card) == []
    data = front_matter(card)
    assert data['library_name'] == 'timm'
    assert data['pipeline_tag'] == 'image-classification'
    assert data['tags'] == ['image-classification', 'timm', 'apvit']
    assert (data['base_model'], data['base_model_relation']) == (VIT, 'finetune')
    assert data['license'] == 'apache-2.0'
    assert data['datasets'] == ['me/birds']
    assert data['metrics'] == ['accuracy']
    (model,) = data['model-index']
    assert model['name'] == 'model'
    (result,) = model['results']
    assert result['task'] == {'type': 'image-classification'}
    assert result['dataset'] == {'type': 'me/birds', 'name': 'Birds'}
    assert [metric['value'] for metric in result['metrics']] == [0.5, 0.9, 0.625, 0.9]
    assert result['metrics'][2]['name'] == 'top-1 accuracy at 2x8 patches'
    assert result['metrics'][2]['args'] == {'num_patches': 16}
    # huggingface_hub reads it as it was written.
    read = ModelCard(card)
    assert read.data.to_dict() == data
    assert len(read.data.eval_results) == 4


def test_metrics_go_by_the_names_of_the_hub():
    rows = [{'budget': '4', 'num_patches': 4, 'map': 0.5}]
    front = front_matter(model_card(create(num_classes=3), 'me/model', details=CardDetails(results={'rows': rows})))
    assert front['metrics'] == ['mean_average_precision']
    (metric,) = front['model-index'][0]['results'][0]['metrics']
    assert (metric['type'], metric['name']) == ('mean_average_precision', 'mean average precision at 4 patches')


def test_model_of_unknown_origin_claims_no_source_and_no_license():
    data = front_matter(model_card(timm.create_model('apvit_tiny', depth=1), 'me/model'))
    assert not data.keys() & {'base_model', 'base_model_relation', 'license', 'datasets', 'metrics', 'model-index'}


@pytest.mark.parametrize(('base', 'license_'), [('timm/vit_base_patch16_224.mae', 'cc-by-nc-4.0'), ('me/other', None)])
def test_license_is_that_of_the_source_weights(base, license_):
    details = CardDetails(base_model=base)
    assert front_matter(model_card(create(), 'me/model', details=details)).get('license') == license_
    own = CardDetails(base_model=base, license='mit')
    assert front_matter(model_card(create(), 'me/model', details=own))['license'] == 'mit'


def test_model_is_not_its_own_source():
    model = create()
    model.base_model = 'me/model'
    assert 'base_model' not in front_matter(model_card(model, 'me/model'))
    assert front_matter(model_card(model, 'me/next'))['base_model'] == 'me/model'


def test_next_version_has_the_source_and_the_license_of_the_last():
    model = create()
    model.base_model = 'me/model'
    model.pretrained_cfg['license'] = 'mit'
    assert front_matter(model_card(model, 'me/model'))['license'] == 'mit'
    details = with_origin(model, 'me/model', CardDetails(), lambda: VIT)
    assert (details.base_model, details.license) == (VIT, 'apache-2.0')
    details = with_origin(model, 'me/model', CardDetails(), lambda: 'me/older')
    assert (details.base_model, details.license) == ('me/older', 'mit')
    # Other weights than the model was pulled with have another license.
    assert with_origin(model, 'me/model', CardDetails(base_model='me/other')).license is None


def test_table_has_a_line_for_each_budget():
    table = results_table(RESULTS, 'Birds')
    assert table.splitlines() == [
        '| patches | top-1 | top-5 | loss | M multiply-adds | images/s alone | images/s in batches of 64 |',
        '|---|---|---|---|---|---|---|',
        '| 4 | 0.500 | 0.900 | 1.250 | 4.0 | 300.0 | 250.0 |',
        '| 2x8 | 0.625 | 0.900 | 1.250 | 16.0 | 300.0 | 62.5 |',
        '',
        '24 images of Birds; on a CPU, 2 threads; timm 1.0; products only.',
    ]
    short = {'rows': [{'budget': '4', 'num_patches': 4, 'top1': 0.5}], 'note': 'of the best epoch'}
    assert results_table(short, 'Birds').splitlines()[::2] == [
        '| patches | top-1 |',
        '| 4 | 0.500 |',
        'On Birds; of the best epoch.',
    ]


def test_sections_are_those_that_are_known(tmp_path):
    bare = sections(model_card(create(), 'me/model'))
    assert list(bare) == ['Use', 'Model', 'Limits']
    assert 'No accuracy was measured' in bare['Limits']
    picture = tmp_path / 'p.png'
    picture.write_bytes(b'')
    training = 'epochs: 3\nmodel_kwargs: {note: "```"}\n'
    full = sections(
        model_card(create(), 'me/model', details=CardDetails(results=RESULTS, training=training, picture=picture))
    )
    assert list(full) == ['Use', 'Model', 'Accuracy and speed', 'Where it looks', 'Training', 'Limits']
    assert '(patches.png)' in full['Where it looks']
    fence = re.search(r'^(`{4,})yaml\n(.*)^\1$', full['Training'], re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(fence[2]) == yaml.safe_load(training)


def test_use_says_what_to_install_and_to_import():
    use = sections(model_card(create(), 'me/model', revision='v2'))['Use']
    assert 'pip install timm-apvit' in use
    assert re.search(r'^import timm_apvit', use, re.MULTILINE)
    assert "timm.create_model('hf-hub:me/model@v2', pretrained=True)" in use
    assert "convert('L')" in sections(model_card(create(in_chans=1), 'me/model'))['Use']


def test_model_without_classes_gives_features():
    card = model_card(create(num_classes=0), 'me/model')
    assert front_matter(card)['tags'] == ['image-feature-extraction', 'timm', 'apvit']
    assert 'features = model(image)' in card
    assert 'softmax' not in card


@pytest.mark.parametrize('label', ['a|b', '`c`', 'd\ne', '---', "f'g"])
def test_labels_cannot_break_the_card(label):
    card = model_card(create(num_classes=2), 'me/model', label_names=[label, 'x'])
    assert problems_of_card(card) == []
    assert list(sections(card)) == ['Use', 'Model', 'Limits']


def test_facts_are_those_of_the_model():
    model = create(transform='affine', max_zoom=3.0, num_patches=13)
    facts = sections(model_card(model, 'me/model'))['Model']
    for line in ('| `transform` | `affine` |', '| `max_zoom` | `3.0` |', '| patches | 13, or any other number |'):
        assert line in facts
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f'| parameters | {million:.1f} M |' in facts


@pytest.mark.parametrize('results', [[], {}, {'rows': []}, {'rows': [{}]}, {'rows': [{'top1': 0.5, 'budget': '4'}]}])
def test_rejects_results_without_accuracies(results):
    with pytest.raises(ValueError, match=r'^expected (results with rows|rows with budget)'):
        CardDetails(results=results)


@pytest.mark.parametrize('change', [{'top1': math.nan}, {'top5': math.inf}, {'loss': math.nan}, {'top5': 'high'}])
def test_rejects_results_that_are_no_finite_numbers(change):
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f'expected rows with finite numbers, got {key}={value!r} at 2x8 patches'):
        CardDetails(results={'rows': [ROWS[0], {**ROWS[1], **change}]})


@pytest.mark.parametrize(('results', 'message'), [
    ({'rows': [{**ROWS[0], 'images_per_second': 3.0}]}, 'expected images_per_second by size of the batch, got 3.0'),
    ({'rows': [{**ROWS[0], 'images_per_second': {'1': 'fast'}}]}, "finite numbers, got 1='fast'"),
    ({'rows': ROWS, 'options': None}, 'expected options by name, got None'),
    ({'rows': ROWS, 'versions': 'new'}, "expected versions by name, got 'new'"),
])  # fmt: skip
def test_rejects_results_of_another_shape(results, message):
    with pytest.raises(ValueError, match=message):
        CardDetails(results=results)


def test_table_has_the_speeds_that_all_rows_have():
    rows = [{**ROWS[0], 'images_per_second': {'1': 2.0, '64': 3.0}}, {**ROWS[1], 'images_per_second': {'1': 4.0}}]
    table = results_table({'rows': rows}, 'birds')
    assert 'images/s alone |\n' in table
    assert '64' not in table.partition('\n')[0]


def test_rejects_a_picture_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected a picture, got'):
        CardDetails(picture=tmp_path / 'none.png')


def test_rejects_one_string_for_the_datasets():
    with pytest.raises(ValueError, match="expected a sequence of datasets, got the string 'me/birds'"):
        CardDetails(datasets='me/birds')


@pytest.mark.parametrize(('channels', 'several'), [(1, False), (3, True), (3, False), (4, False)])
def test_snippet_runs(channels, several, tmp_path, monkeypatch):
    """As it stands, but for where the weights lie."""
    from PIL import Image

    import timm_apvit

    model = create(num_classes=2, img_size=64, in_chans=channels)
    if several:  # an image is of both classes
        torch.nn.init.constant_(model.head.bias, 9.0)
    kind = {'problem_type': 'multi_label_classification' if several else None}
    timm_apvit.save_pretrained(model, tmp_path / 'saved', label_names=['cat', 'dog'], model_config=kind)
    Image.new('RGB', (50, 70), 'red').save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    use = sections(model_card(model, 'me/model', label_names=['cat', 'dog']))['Use']
    code = re.search(r'```python\n(.*?)```', use, re.DOTALL)[1].replace('hf-hub:me/model', 'local-dir:saved')
    printed = []
    space = {'print': printed.append}
    exec(code, space)
    assert printed[0] in ([['cat', 'dog']] if several else ['cat', 'dog'])
    assert space['model'].num_patches == 8
    assert space['geometry'].centres.shape == (1, 8, 2)
