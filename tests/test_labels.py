"""Names of classes in the forms that users have at hand."""

import json
import re

import numpy as np
import pytest
from conftest import create

from timm_apvit.export import image_facts
from timm_apvit.hub.labels import checked_label_names, class_names, saved_label_names

NAMES = ['owl', 'tit', 'emu']


@pytest.mark.parametrize(
    'given',
    [
        NAMES,
        tuple(NAMES),
        np.array(NAMES),
        dict(enumerate(NAMES)).values(),
        {2: 'emu', 0: 'owl', 1: 'tit'},
        {'1': 'tit', '2': 'emu', '0': 'owl'},
        {np.int64(number): name for number, name in enumerate(NAMES)},
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_form_gives_the_same_list(given):
    names = checked_label_names(given, 3)
    assert names == NAMES
    assert {type(name) for name in names} == {str}


def test_names_by_number_are_in_the_order_of_the_numbers():
    assert checked_label_names({str(n): f'name {n}' for n in range(11, -1, -1)}, 12)[9:] == [
        'name 9',
        'name 10',
        'name 11',
    ]


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ('owl', "expected label_names as a list of strings, or by number, got 'owl'"),
        ({'owl'}, "as a list of strings, or by number, got {'owl'}"),
        ({1: 'owl', 2: 'tit', 3: 'emu'}, 'by number, from 0 to 2, got the keys 1, 2, 3'),
        ({'owl': 0, 'tit': 1, 'emu': 2}, "by number, from 0 to 2, got the keys 'owl', 'tit', 'emu'"),
        ({0: 'owl', 1.0: 'tit', 2: 'emu'}, 'got the keys 0, 1.0, 2'),
        ({0: 'owl', 1: None, 2: 'emu'}, 'expected label_names that are strings, got None'),
        ([0, 1, 2], 'expected label_names that are strings, got 0, 1, 2'),
        (['owl', 'tit'], "expected names of 3 classes, got 2: 'owl', 'tit'"),
        ([], 'expected names of 3 classes, got 0'),
        (['owl', 'tit', 'owl'], "expected label_names that all differ, got 'owl' more than once"),
        (['owl'] * 7, "got 7: 'owl', 'owl', 'owl', 'owl', 'owl' and 2 more"),
    ],
)
def test_rejects_what_does_not_name_each_class(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_label_names(given, 3)


def test_saved_names_are_those_of_the_classes(tmp_path):
    for config, expected in (
        ({'label_names': NAMES, 'pretrained_cfg': {'label_names': ['old']}}, NAMES),
        ({'label_names': {'1': 'tit', '0': 'owl', '2': 'emu'}, 'pretrained_cfg': {}}, NAMES),
        ({'pretrained_cfg': {'label_names': NAMES}}, NAMES),
        ({'pretrained_cfg': {}}, None),
    ):
        (tmp_path / 'config.json').write_text(json.dumps(config))
        assert saved_label_names(tmp_path, 3) == expected


def test_classes_are_those_of_imagenet_or_numbers_where_nothing_names_them():
    model = create()
    assert class_names(model)[0].startswith('tench')
    model.pretrained_cfg['hf_hub_id'] = 'me/birds'  # whose classes nobody named
    assert class_names(model)[:2] == ['0', '1']
    model.reset_classifier(3)
    assert class_names(model) == ['0', '1', '2']
    model.pretrained_cfg['label_names'] = NAMES
    assert class_names(model) == image_facts(model, (160, 160))['label_names'] == NAMES
    model.reset_classifier(2)  # of other classes than these
    assert class_names(model) == ['0', '1']
    assert 'label_names' not in image_facts(model, (160, 160))
