"""Options: defaults that depend on others."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import pytest

from timm_apvit.finetuning.config import config_text, resumed_options
from timm_apvit.finetuning.options import REMOVED_OPTIONS, Options, add_arguments
from timm_apvit.finetuning.preparation import with_defaults


def test_embedded_defaults_give_way_to_model_kwargs():
    options = with_defaults(Options(model_kwargs={'transform': 'affine', 'img_size': 64}))
    assert options.transform is None
    assert options.img_size is None
    assert options.num_patches == ((4, 4),)
    assert options.model_kwargs['transform'] == 'affine'
    assert with_defaults(Options(transform='scale')).transform == 'scale'


def test_help_of_every_option_names_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    needless = {'help', 'resume', 'output', 'model_kwargs', 'checkpoint', 'pretrained', *REMOVED_OPTIONS}  # or nothing
    silent = [a.dest for a in parser._actions if a.dest not in needless and 'default' not in (a.help or '')]
    assert silent == []
    assert {a.dest for a in parser._actions} - {'help', 'config'} == {
        each.name for each in fields(Options)
    } | REMOVED_OPTIONS.keys()
    parser.print_help()  # fails on a stray %
    assert '--attention-weight' in capsys.readouterr().out


def test_resume_lets_change_what_memory_needs(tmp_path: Path) -> None:
    options = with_defaults(Options(num_patches=(16, (7, 14)), model='test_apvit'))
    (tmp_path / 'config.yaml').write_text(config_text(options))
    given = {'num_patches': (16, (7, 14)), 'grad_accum': 4, 'grad_checkpointing': True, 'timeout': 3.0}
    expected = replace(options, grad_accum=4, grad_checkpointing=True, timeout=3.0)
    assert resumed_options(tmp_path, given) == expected
    with pytest.raises(ValueError, match=r'--num-patches 16,98 \(the run has 16,7x14\), --mixup 0.5 \(the run has 0'):
        resumed_options(tmp_path, {'num_patches': (16, 98), 'mixup': 0.5})
