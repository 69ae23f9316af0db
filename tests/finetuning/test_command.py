"""The command, from its arguments to the files that it leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from images import write_images
from PIL import Image
from safetensors.torch import save_file
from tiny import read_metrics

from timm_apvit.cli.main import main
from timm_apvit.finetuning.preparation import resolve_settings
from timm_apvit.finetuning.processes import create_accelerator
from timm_apvit.finetuning.run import Run, execute, load_run, make_folder
from timm_apvit.finetuning.values import parse_num_patches

TINY = '--model test_apvit --img-size 32 --num-patches 2 --samples 32 --test-samples 16 --batch-size 16 --epochs 2'
TINY += ' --model-kwargs drop_path_rate=0.1 jitter=0.1 --threads 1 --workers 0 --device cpu --twin'

# Ends the process, as a power cut would, in the n-th update of the weights.
KILLED = """
import os, signal, sys, torch
from timm_apvit.cli.main import main
step, left = torch.optim.AdamW.step, [int(sys.argv.pop(1))]
def deadly_step(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
torch.optim.AdamW.step = deadly_step
sys.exit(main(sys.argv[1:]))
"""


def weights_of(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(directory / 'last/training.pt', weights_only=True)
    return state['model']


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('runs') / 'unbroken'
    assert main(['finetune', *TINY.split(), '--output', str(directory)]) == 0
    return directory


def test_run_leaves_model_metrics_summary_and_picture(unbroken: Path) -> None:
    rows, twin_rows = read_metrics(unbroken), read_metrics(unbroken / 'twin')
    assert [row['epoch'] for row in rows] == [row['epoch'] for row in twin_rows] == [1, 2]
    assert rows[0]['lr'] > rows[1]['lr'] > 0
    summary = json.loads((unbroken / 'summary.json').read_text())
    assert summary['test_apvit']['top1'] == rows[-1]['test_top1']
    assert summary['test_apvit']['best_top1'] == max(row['test_top1'] for row in rows)
    assert summary['fixed grid']['num_patches'] == summary['test_apvit']['num_patches'] == 2
    assert np.asarray(Image.open(unbroken / 'patches.png')).std() > 0
    best = timm.create_model(f'local-dir:{unbroken / "best"}', pretrained=True)
    assert best.num_patches == 2
    assert best.patch_embed.patching.jitter == 0.1
    assert best.pretrained_cfg['label_names'] == list('0123456789')
    assert {'patch_shift', 'patch_zoom', 'patch_turn'} < rows[0].keys()
    baseline = timm.create_model(f'local-dir:{unbroken / "twin/best"}', pretrained=True)
    assert type(baseline).__name__ == 'VisionTransformer'
    assert baseline.pretrained_cfg['input_size'] == (3, 16, 32)
    assert baseline.pretrained_cfg['label_names'] == list('0123456789')
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(best.eval()(images).shape, torch.Size([2, 10]))


@pytest.mark.slow
@pytest.mark.parametrize('updates', [1, 7], ids=['first epoch', 'twin'])
def test_killed_run_resumes_to_the_result_of_the_unbroken_one(updates: int, unbroken: Path, tmp_path: Path) -> None:
    directory = tmp_path / 'killed'
    command = [sys.executable, '-c', KILLED, str(updates), 'finetune', *TINY.split(), '--output', str(directory)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    if updates > 2:
        saved = timm.create_model(f'local-dir:{directory / "last"}', pretrained=True)
        assert timm.create_model(f'local-dir:{directory / "best"}', pretrained=True).num_patches == saved.num_patches
        assert len(read_metrics(directory)) == 2
    assert not (directory / 'summary.json').exists()

    assert main(['finetune', '--resume', str(directory), '--threads', '1']) == 0
    for part in ('.', 'twin'):
        assert read_metrics(directory / part) == read_metrics(unbroken / part)
        resumed, expected = weights_of(directory / part), weights_of(unbroken / part)
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    name = 'last/model.safetensors'
    assert (directory / name).read_bytes() == (unbroken / name).read_bytes()


def test_resuming_a_finished_run_changes_nothing(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in unbroken.rglob('*') if path.is_file() and path.suffix != '.png'}
    assert main(['finetune', '--resume', str(unbroken)]) == 0
    assert 'test_apvit        2' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_vit_checkpoint_to_tuned_model_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224')
    torch.nn.init.normal_(vit.pos_embed, std=0.02)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    arguments = {
        'model': 'apvit_tiny',
        'checkpoint': str(tmp_path / 'vit.safetensors'),
        'num_patches': (49,),
        'samples': 8,
        'test_samples': 8,
        'batch_size': 4,
        'epochs': 2,
        'device': 'cpu',
        'twin': False,
        'output': str(tmp_path / 'run'),
    }

    def prepared(**changes: Any) -> Run:
        settings, directory = resolve_settings({**arguments, **changes})
        return load_run(settings, directory, create_accelerator(settings, directory))

    run = prepared()
    assert 'a glance of the first 6 blocks finds, fitted first for 10 epochs' in run.notes[-1]
    again = prepared(localizer='cnn', output=str(tmp_path / 'other'))
    assert not any('glance' in note for note in again.notes)
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert all(torch.equal(start[key], value) for key, value in vit.state_dict().items() if not key.startswith('head.'))
    execute(run._replace(locked=make_folder(run)))
    images = torch.randn(2, 3, 224, 224)
    reloaded = timm.create_model(f'local-dir:{tmp_path / "run/last"}', pretrained=True).eval()
    assert reloaded.num_patches == 49
    with torch.no_grad():
        assert torch.equal(reloaded(images), run.model.eval()(images))
    adaptive = [key for key in start if '.patching.' in key]
    assert any(not torch.equal(start[key], reloaded.state_dict()[key]) for key in adaptive)


def test_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('train/cat', 'train/dog', 'val/cat', 'val/dog'):
        write_images(tmp_path / 'images' / name, 4)
    tiny = '--model test_apvit --img-size 32 --epochs 1 --batch-size 4 --workers 0 --device cpu'
    output = tmp_path / 'run'
    assert main(['finetune', str(tmp_path / 'images'), *tiny.split(), '--output', str(output)]) == 0
    assert json.loads((output / 'best/config.json').read_text())['label_names'] == ['cat', 'dog']
    assert 'fixed grid' not in capsys.readouterr().out
    assert (output / 'patches.png').stat().st_size > 0


def test_rejects_options_that_contradict_the_resumed_run(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['finetune', '--resume', str(unbroken), '--lr', '9', '--num-patches', '1x2', '--seed', '0']) == 2
    error = capsys.readouterr().err
    assert '--lr 9.0 (the run has 0.001)' in error
    assert '--num-patches 1x2 (the run has 2)' in error
    assert '--seed' not in error


def test_rejects_a_damaged_run(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'last').mkdir()
    (tmp_path / 'config.yaml').write_text((unbroken / 'config.yaml').read_text())
    (tmp_path / 'last').rename(tmp_path / 'version')
    (tmp_path / 'last').symlink_to('version')
    (tmp_path / 'last/training.pt').write_bytes((unbroken / 'last/training.pt').read_bytes()[:1000])
    assert main(['finetune', '--resume', str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith('error: expected a readable state, got a damaged')


@pytest.mark.parametrize('module', ['sklearn', 'accelerate', 'tqdm', 'matplotlib'])
def test_missing_extra_is_named(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(['finetune', *TINY.split(), '--output', str(tmp_path / 'run')]) == 2
    assert "pip install 'timm-apvit[finetune]'" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_numbers_of_patches_are_parsed() -> None:
    assert parse_num_patches('49') == (49,)
    assert parse_num_patches('3x7') == ((3, 7),)
    assert parse_num_patches('16, 7x14,196') == (16, (7, 14), 196)


def test_resume_refuses_other_classes_and_takes_its_own_options(tmp_path, capsys):
    data, output = tmp_path / 'data', tmp_path / 'run'
    for split in ('train', 'val'):
        for name in 'ab':
            (data / split / name).mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(data / split / name / '1.png')
    own = [
        '--model',
        'test_apvit',
        '--img-size',
        '32',
        '--epochs',
        '1',
        '--model-kwargs',
        'num_patches=(2, 2)',
        'depth=2',
    ]
    assert main(['finetune', str(data), *own, '--output', str(output)]) == 0
    config = json.loads((output / 'best' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert main(['finetune', str(data), *own, '--resume', str(output)]) == 0
    data.rename(tmp_path / 'moved')
    data = tmp_path / 'moved'
    assert main(['finetune', '--resume', str(output)]) == 2
    assert main(['finetune', str(data), '--resume', str(output)]) == 0
    Image.new('RGB', (32, 32)).save(data / 'train/a/2.png')
    capsys.readouterr()
    assert main(['finetune', '--resume', str(output)]) == 2
    assert 'expected the 2 training images that the run began with, got 3' in capsys.readouterr().err
    (data / 'train/a/2.png').unlink()
    for split in ('train', 'val'):
        (data / split / 'b').rename(data / split / 'c')
    capsys.readouterr()
    assert main(['finetune', '--resume', str(output)]) == 2
    assert 'expected the classes that the run was trained on, a, b, got a, c' in capsys.readouterr().err


def test_grey_digits_are_trained_and_saved_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = ['--samples', '32', '--test-samples', '8', '--epochs', '1', '--warmup', '0.5', '--no-twin']
    assert main(['finetune', *sizes, '--output', str(tmp_path / 'run')]) == 0
    assert not [record for record in caplog.records if 'does not match' in record.getMessage()]
    model = timm.create_model(f'local-dir:{tmp_path / "run" / "best"}', pretrained=True)
    assert model(torch.randn(1, 1, 112, 112)).shape == (1, 10)
