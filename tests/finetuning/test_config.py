"""Configuration files: what they may say, and that one repeats a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import read_metrics

from timm_apvit.__main__ import main
from timm_apvit.finetuning.config import config_text, read_config, resumed_options, with_config
from timm_apvit.finetuning.options import Options

TINY = '--model test_apvit --img-size 32 --num-patches 2,1x3 --samples 32 --test-samples 16 --batch-size 16 --epochs 1'
TINY += ' --model-kwargs drop_path_rate=0.1 jitter=0.1 depth=2 --threads 1 --device cpu --no-twin --seed 3'


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values) if path.suffix == '.json' else yaml.safe_dump(values))
    return path


def test_configuration_of_a_run_repeats_it_exactly(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ('first', 'second', 'third'))
    assert main(['finetune', *TINY.split(), '--output', str(first)]) == 0
    config = ['--config', str(first / 'config.yaml'), '--threads', '1', '--device', 'cpu']
    assert main(['finetune', *config, '--output', str(second)]) == 0
    assert read_metrics(second) == read_metrics(first)
    name = 'last/model.safetensors'
    assert (second / name).read_bytes() == (first / name).read_bytes()
    assert (second / 'config.yaml').read_text() == (first / 'config.yaml').read_text()
    # What the command line says wins; arguments of the model are merged.
    assert main(['finetune', *config, '--seed', '4', '--model-kwargs', 'depth=1', '--output', str(third)]) == 0
    assert read_metrics(third) != read_metrics(first)
    written = read_config(third / 'config.yaml')
    assert written['seed'] == 4
    assert written['model_kwargs'] == {'drop_path_rate': 0.1, 'jitter': 0.1, 'depth': 1}
    assert main(['finetune', '--resume', str(third)]) == 0


OPTIONS = Options(
    data='torch/mnist',
    num_patches=(16, (3, 5)),
    model_kwargs={'img_size': (32, 48), 'global_pool': 'avg', 'class_token': False, 'max_shift': 2.0},
    scale=[0.1, 1.0],
    lr=1e-05,
    twin=False,
    pretrained=True,
    no_aug=True,
)


def test_every_option_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / 'config.yaml'
    path.write_text(config_text(OPTIONS))
    assert resumed_options(tmp_path, {}) == OPTIONS
    text = path.read_text()
    assert 'num_patches: 16,3x5\n' in text
    given = {'num_patches': (16, (3, 5)), 'scale': [0.1, 1.0], 'model_kwargs': {'max_shift': 2.0}, 'device': 'cpu'}
    assert resumed_options(tmp_path, given).device == 'cpu'


@pytest.mark.parametrize('name', ['config.yaml', 'config.json'])
def test_files_take_what_the_command_line_takes(name: str, tmp_path: Path) -> None:
    values = {
        'data': 'images',
        'num-patches': [16, [3, 5]],
        'model_kwargs': {'img_size': [32, 48], 'global_pool': 'avg'},
        'scale': [0.1, 1],
        'lr': '1e-5',
        'twin': False,
        'pretrained': True,
        'img_size': None,
    }
    assert read_config(write(tmp_path / name, values)) == {
        'data': 'images',
        'num_patches': (16, (3, 5)),
        'model_kwargs': {'img_size': (32, 48), 'global_pool': 'avg'},
        'scale': [0.1, 1.0],
        'lr': 1e-5,
        'twin': False,
        'pretrained': True,
        'img_size': None,
    }
    given = with_config({'config': str(tmp_path / name), 'lr': 1.0})
    assert given['lr'] == 1.0
    assert 'img_size' not in given
    assert 'config' not in given


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'epoch': 3}, r"names of options in .*c\.yaml, got 'epoch' \(did you mean epochs"),
        ({'nm_ptches': 3, 'zzz': 1}, r"got 'nm_ptches' \(did you mean num_patches.*\), 'zzz'"),
        ({'resume': 'x'}, "got 'resume'"),
        ({'config': 'x'}, "got 'config'"),
        ({'max_focus': 5}, r'c\.yaml: --max-focus was removed: --localizer glance finds the window'),
        ({'epochs': 0}, r"c\.yaml: argument --epochs: expected an integer >= 1, got '0'"),
        ({'epochs': True}, 'argument --epochs'),
        ({'pretrained': 'yes'}, 'argument --pretrained'),
        ({'scale': [0.1]}, 'argument --scale: expected 2 arguments'),
        ({'epochs': [1, 2]}, r'expected one value for epochs, got \[1, 2\]'),
        ({'model': ['a', 'b']}, 'expected one value for model'),
        ({'data': ['a', 'b']}, 'expected data to be a folder or the name of a dataset'),
        ({'num_patches': 'many'}, "argument --num-patches: .* got 'many'"),
        ({'model_kwargs': 3}, "argument --model-kwargs: expected key=value, got '3'"),
        ([1], 'names of options and their values in .*, got list'),
        ({3: 4}, 'names of options and their values'),
    ],
)
def test_rejects_configurations_by_what_is_wrong(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path / 'c.yaml', values))


def test_command_refuses_a_configuration_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'c.yaml').write_text('a: [')
    (tmp_path / 'c.json').write_text('{')
    for arguments, message in (
        (['--config', str(tmp_path / 'c.yaml')], 'expected YAML or JSON, got a damaged'),
        (['--config', str(tmp_path / 'c.json')], 'expected YAML or JSON, got a damaged'),
        (['--config', str(tmp_path / 'none.yaml')], 'none.yaml'),
        (['--config', 'c.yaml', '--resume', 'x'], 'expected --config or --resume'),
    ):
        assert main(['finetune', *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        assert message in error


def test_rejects_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'holds config\.yaml, got'):
        resumed_options(tmp_path, {})
    write(tmp_path / 'config.yaml', {'epochs': 3})
    with pytest.raises(ValueError, match=r'the options of a run in .*, got none for aa, amp, '):
        resumed_options(tmp_path, {})
