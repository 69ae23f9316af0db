"""What a run says on the model card, and what the push command refuses before it asks the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import create

from timm_apvit.cli.main import main
from timm_apvit.cli.push import card_of
from timm_apvit.hub.saving import save_pretrained


def test_card_tells_no_address_of_the_data(tmp_path: Path) -> None:
    config = {
        'model': 'local-dir:/home/jo/model',
        'data': 'wds/',
        'data_dir': '/home/jo/shards',
        'train_split': 'pipe:curl -H "Authorization: secret" address',
        'val_split': 's3://key:secret@bucket/val.tar',
        'model_kwargs': {'pretrained_cfg_overlay': {'file': '/home/jo/weights.pth'}, 'drop_rate': 0.1},
        'scale': [0.5, 1.0],
        'teacher': None,
    }
    (tmp_path / 'config.yaml').write_text(json.dumps(config))
    training = card_of(tmp_path, {}).training
    assert yaml.safe_load(str(training)) == {
        'model': 'local-dir:model',
        'data': 'wds/',
        'data_dir': 'shards',
        'train_split': 'pipe:...',
        'val_split': 's3:...',
        'model_kwargs': {'pretrained_cfg_overlay': {'file': 'weights.pth'}, 'drop_rate': 0.1},
        'scale': [0.5, 1.0],
    }


@pytest.mark.parametrize(
    ('data', 'dataset', 'ids'),
    [
        ('hfds/me/birds', ('me/birds', 'me/birds'), ('me/birds',)),
        ('hfids/birds', ('birds', 'birds'), ('birds',)),
        ('torch/fashion_mnist', ('fashion_mnist', 'torch/fashion_mnist'), ()),
        ('wds/', ('wds', 'wds/'), ()),
        ('some/birds', ('imagefolder', 'birds'), ()),
        ('/home/jo/birds', ('imagefolder', 'birds'), ()),
        (None, ('digits', 'digits among clutter, the embedded data of timm-apvit'), ()),
    ],
)
def test_dataset_is_that_of_the_run(data: Any, dataset: Any, ids: Any, tmp_path: Path) -> None:
    (tmp_path / 'config.yaml').write_text(json.dumps({'model': 'test_apvit', 'data': data}))
    card = card_of(tmp_path, {})
    assert card.results_dataset == dataset
    assert card.datasets == ids
    assert card_of(tmp_path, {'dataset': ['me/own']}).datasets == ('me/own',)


def test_rejects_what_is_no_run_and_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.yaml').write_text('model: test_apvit\n')
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged/config.yaml').write_text('model: [\n')
    (tmp_path / 'damaged/best').mkdir()
    for name, message in {
        'none': 'expected the folder of a run or of a model',
        '.': 'which holds neither config.yaml nor config.json',
        'run': 'expected a run with a saved model',
        'damaged': 'expected YAML or JSON, got a damaged',
    }.items():
        assert main(['push', str(tmp_path / name), 'me/model']) == 2
        assert message in capsys.readouterr().err


def test_rejects_a_damaged_summary(tmp_path: Path) -> None:
    (tmp_path / 'config.yaml').write_text('model: test_apvit\n')
    for text in ('{', '{}', '[]', '{"test_apvit": {}}'):
        (tmp_path / 'summary.json').write_text(text)
        with pytest.raises(ValueError, match='expected the summary of a run, got a damaged'):
            card_of(tmp_path, {})


def test_rejects_results_that_evaluate_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(create(img_size=32), tmp_path / 'saved')
    (tmp_path / 'list.json').write_text('[1]')
    (tmp_path / 'half.json').write_text('{"rows": [')
    for name in ('list.json', 'half.json', 'none.json'):
        assert main(['push', str(tmp_path / 'saved'), 'me/model', '--results', str(tmp_path / name)]) == 2
        assert 'expected a file that evaluate --json wrote, got' in capsys.readouterr().err
    assert main(['push', str(tmp_path / 'saved'), 'me/model', '--picture']) == 2
    assert 'expected a picture, got' in capsys.readouterr().err
