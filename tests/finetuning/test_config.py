"""Configuration files: what they may say, and that one repeats a run."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import read_metrics

from timm_apvit.cli.main import main
from timm_apvit.cli.options import add_settings
from timm_apvit.finetuning.config import config_text, read_config, resumed_settings, with_config
from timm_apvit.finetuning.preparation import with_defaults
from timm_apvit.finetuning.settings import FIELDS, REMOVED, Settings

TINY = '--model test_apvit --img-size 32 --num-patches 2,1x3 --samples 32 --test-samples 16 --batch-size 16 --epochs 1'
TINY += ' --model-kwargs drop_path_rate=0.1 jitter=0.1 depth=2 --threads 1 --device cpu --no-twin --seed 3'


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values) if path.suffix == '.json' else yaml.safe_dump(values))
    return path


@pytest.mark.slow
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


OPTIONS = Settings(
    data='torch/mnist',
    model='test_apvit',
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
    assert resumed_settings(tmp_path, {}) == OPTIONS
    text = path.read_text()
    assert 'num_patches: 16,3x5\n' in text
    given = {'num_patches': (16, (3, 5)), 'scale': [0.1, 1.0], 'model_kwargs': {'max_shift': 2.0}, 'device': 'cpu'}
    assert resumed_settings(tmp_path, given).device == 'cpu'


def test_embedded_defaults_give_way_to_model_kwargs() -> None:
    settings = with_defaults(Settings(model_kwargs={'transform': 'affine', 'img_size': 64}))
    assert settings.transform is None
    assert settings.img_size is None
    assert settings.num_patches == ((4, 4),)
    assert settings.model_kwargs['transform'] == 'affine'
    assert with_defaults(Settings(transform='scale')).transform == 'scale'


def test_help_of_every_option_names_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    needless = {'help', 'resume', 'output', *REMOVED}
    silent = [a.dest for a in parser._actions if a.dest not in needless and 'default' not in (a.help or '')]
    assert silent == []
    assert {a.dest for a in parser._actions} - {'help', 'config'} == FIELDS.keys() | REMOVED.keys()
    parser.print_help()  # fails on a stray %
    assert '--attention-weight' in capsys.readouterr().out


def test_resume_lets_change_what_memory_needs_and_how_long_it_is(tmp_path: Path) -> None:
    settings = with_defaults(Settings(num_patches=(16, (7, 14)), model='test_apvit'))
    (tmp_path / 'config.yaml').write_text(config_text(settings))
    given = {'num_patches': (16, (7, 14)), 'grad_accum': 4, 'grad_checkpointing': True, 'timeout': 3.0, 'epochs': 20}
    expected = replace(settings, grad_accum=4, grad_checkpointing=True, timeout=3.0, epochs=20)
    assert resumed_settings(tmp_path, given) == expected
    with pytest.raises(ValueError, match=r'--num-patches 16,98 \(the run has 16,7x14\), --mixup 0.5 \(the run has 0'):
        resumed_settings(tmp_path, {'num_patches': (16, 98), 'mixup': 0.5})


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
        ({'amp': 'x'}, "amp: expected bfloat16 or float16, got 'x'"),
        ({'epoch': 3}, r"names of options in .*c\.yaml, got 'epoch' \(did you mean epochs"),
        ({'nm_ptches': 3, 'zzz': 1}, r"got 'nm_ptches' \(did you mean num_patches.*\), 'zzz'"),
        ({'resume': 'x'}, "got 'resume'"),
        ({'config': 'x'}, "got 'config'"),
        ({'max_focus': 5}, r'c\.yaml: --max-focus was removed: --localizer glance finds the window'),
        ({'epochs': 0}, r'c\.yaml: epochs: expected an integer >= 1, got 0'),
        ({'epochs': True}, 'epochs: expected an integer >= 1, got True'),
        ({'pretrained': 'yes'}, "pretrained: expected true or false, got 'yes'"),
        ({'scale': [0.1]}, r'scale: expected a list of 2, got \[0\.1\]'),
        ({'epochs': [1, 2]}, r'epochs: expected an integer >= 1, got \[1, 2\]'),
        ({'model': ['a', 'b']}, 'model: expected a string'),
        ({'data': ['a', 'b']}, 'data: expected a string'),
        ({'num_patches': 'many'}, "num_patches: .* got 'many'"),
        ({'model_kwargs': 3}, 'model_kwargs: expected names of arguments and their values, got 3'),
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
        resumed_settings(tmp_path, {})
    write(tmp_path / 'config.yaml', {'epochs': 3})
    with pytest.raises(ValueError, match=r'the options of a run in .*, got none for model'):
        resumed_settings(tmp_path, {})
