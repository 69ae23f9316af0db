"""Training that is interrupted, resumed, lengthened: what is kept, and how it goes on."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import read_metrics, run, weights_of

from timm_apvit.cli.main import main
from timm_apvit.finetuning import run as run_module
from timm_apvit.finetuning.checkpoints import CheckpointStore, lock
from timm_apvit.finetuning.config import read_config


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Have Ctrl-C heard: a shell starts what it runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('_ctrl_c')
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_update_and_its_checkpoint(
    number: int, status: int, second_epoch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_epoch['act'] = lambda loss: loss
    assert run(tmp_path / 'unbroken') == 0
    second_epoch['act'] = lambda loss: (signal.raise_signal(number), loss)[1]
    assert run(tmp_path / 'run') == status
    assert capsys.readouterr().err == f'interrupted; continue with --resume {tmp_path / "run"}\n'
    state = CheckpointStore(tmp_path / 'run').load()
    assert state is not None
    assert (state['update'], len(state['rows'])) == (3, 1)
    assert (tmp_path / 'run/last').resolve().name == 'epoch-0001-update-0000001'
    assert timm.create_model(f'local-dir:{tmp_path / "run/last"}', pretrained=True).num_patches == 2
    second_epoch['act'] = lambda loss: loss
    assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 0
    assert weights_of(tmp_path / 'run').keys() == weights_of(tmp_path / 'unbroken').keys()
    torch.testing.assert_close(weights_of(tmp_path / 'run'), weights_of(tmp_path / 'unbroken'), rtol=0, atol=0)
    assert read_metrics(tmp_path / 'run') == read_metrics(tmp_path / 'unbroken')


@pytest.mark.usefixtures('_ctrl_c')
def test_interruption_while_saving_waits_until_the_checkpoint_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run_module.save_pretrained

    def interrupted(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(run_module, 'save_pretrained', interrupted)
    assert run(tmp_path / 'run') == 130
    state = CheckpointStore(tmp_path / 'run').load()
    assert state is not None
    assert [row['epoch'] for row in state['rows']] == [1]


@pytest.mark.usefixtures('_ctrl_c')
def test_a_second_interruption_ends_the_run_at_once(
    second_epoch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_epoch['act'] = lambda loss: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    assert run(tmp_path / 'run') == 130
    assert f'continue with --resume {tmp_path / "run"}' in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = CheckpointStore(tmp_path / 'run').load()
    assert state is not None
    assert state['update'] == 2


def test_checkpoints_are_saved_within_an_epoch_when_minutes_have_passed(tmp_path: Path) -> None:
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        save = CheckpointStore.save
        patched.setattr(
            CheckpointStore, 'save', lambda self, name, *args: names.append(name) or save(self, name, *args)
        )
        assert run(tmp_path / 'run', '--save-minutes', '1e-9') == 0
    assert names == [
        *('epoch-0000-update-0000001', 'epoch-0001', 'epoch-0001-update-0000001', 'epoch-0002'),
        *('epoch-0002-update-0000001', 'epoch-0003'),
    ]
    assert len(list((tmp_path / 'run/checkpoints').iterdir())) <= 2


def test_a_finished_run_is_lengthened_and_one_that_gets_no_better_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / 'run') == 0
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '5']) == 0
    rows = read_metrics(tmp_path / 'run')
    assert [row['epoch'] for row in rows] == [1, 2, 3, 4, 5]
    assert read_config(tmp_path / 'run/config.yaml')['epochs'] == 5
    assert run(tmp_path / 'short', '--patience', '1', '--monitor', 'test_loss', '--lr', '1e-12', '--epochs', '9') == 0
    rows = read_metrics(tmp_path / 'short')
    assert len(rows) < 9
    assert rows[-1]['test_loss'] >= rows[-2]['test_loss']
    assert 'the patches have not moved from their grid' in capsys.readouterr().out


def test_a_run_goes_on_without_the_weights_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = timm.create_model('test_vit', img_size=32, depth=1, num_classes=10)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    options = ['--checkpoint', str(tmp_path / 'vit.safetensors'), '--localizer', 'cnn']
    assert run(tmp_path / 'run', *options) == 0
    (tmp_path / 'vit.safetensors').rename(tmp_path / 'moved.safetensors')
    capsys.readouterr()
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '4']) == 0
    assert len(read_metrics(tmp_path / 'run')) == 4
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '2']) == 2
    assert 'expected --epochs of at least the 4 that are done, got 2' in capsys.readouterr().err
    assert read_config(tmp_path / 'run/config.yaml')['epochs'] == 4


def test_a_run_goes_on_when_the_run_that_it_began_with_has_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / 'first', '--epochs', '1') == 0
    options = [
        '--model',
        str(tmp_path / 'first'),
        '--pretrained',
        '--epochs',
        '1',
        '--no-twin',
        '--output',
        str(tmp_path / 'run'),
    ]
    assert main(['finetune', '--samples', '8', '--test-samples', '4', '--device', 'cpu', *options]) == 0
    assert '\nfirst         epoch   1/1' in capsys.readouterr().out
    assert list(json.loads((tmp_path / 'run/summary.json').read_text())) == ['first']
    assert read_config(tmp_path / 'run/config.yaml')['model'] == f'local-dir:{tmp_path / "first/best"}'
    (tmp_path / 'first').rename(tmp_path / 'gone')
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '2']) == 0
    assert len(read_metrics(tmp_path / 'run')) == 2


def test_a_glance_is_said_to_be_fitted_first_only_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = timm.create_model('test_vit', img_size=32, depth=1, num_classes=10)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    options = ['--checkpoint', str(tmp_path / 'vit.safetensors'), '--glance-epochs', '1', '--epochs', '1']
    assert run(tmp_path / 'run', *options) == 0
    assert 'a glance of the first 1 blocks finds, fitted first for 1 epochs' in capsys.readouterr().out
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '2']) == 0
    said = capsys.readouterr().out
    assert 'a glance of the first 1 blocks finds (--localizer cnn' in said
    assert 'fitted first' not in said


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / 'run', '--epochs', '1') == 0
    before = (tmp_path / 'run/metrics.jsonl').read_text()
    with lock(tmp_path / 'run'):
        assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 2
    assert 'expected the folder of a run that no process trains in, got' in capsys.readouterr().err
    assert (tmp_path / 'run/metrics.jsonl').read_text() == before
    assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 0


def test_an_error_before_the_run_begins_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, 'create_accelerator', interrupted)
    assert run(tmp_path / 'run') == 130
    assert capsys.readouterr().err == 'interrupted; nothing was written\n'
