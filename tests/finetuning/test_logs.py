"""Metrics in files, and the bar of progress."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from timm_apvit.__main__ import main
from timm_apvit.finetuning.logs import MetricsLog
from timm_apvit.finetuning.progress import Progress

ROWS = [
    {'epoch': 1, 'lr': 0.1, 'test_top1': 0.25},
    {'epoch': 2, 'lr': 1e-05, 'test_top1': 1 / 3, 'test_top1_16': 0.5},
]


@pytest.mark.parametrize('number', [1, 2])
def test_metrics_are_the_same_in_both_files_and_whole(number: int, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for written in range(1, number + 1):
        log.write(ROWS[:written])
    assert [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == ROWS[:number]
    with (tmp_path / 'metrics.csv').open(newline='') as file:
        read = list(csv.DictReader(file))
    assert [{name: float(text) for name, text in row.items() if text} for row in read] == ROWS[:number]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.csv', 'metrics.jsonl']


def test_tensorboard_shows_every_epoch_once_also_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip('tensorboard', reason='the log is one for TensorBoard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last in (1, 2):  # two processes
        log = MetricsLog(tmp_path, tensorboard=True)
        for number in range(1, last + 1):
            log.write(ROWS[:number])
        log.close()
    shown = EventAccumulator(str(tmp_path / 'tensorboard'))
    shown.Reload()
    assert set(shown.Tags()['scalars']) == {'lr', 'test_top1', 'test_top1_16'}
    events = [(event.step, round(event.value, 6)) for event in shown.Scalars('test_top1')]
    assert events == [(1, 0.25), (2, 0.333333)]


def test_command_writes_for_tensorboard_or_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('tensorboard', reason='the log is one for TensorBoard')
    tiny = '--model test_apvit --img-size 32 --num-patches 2 --samples 8 --test-samples 8 --batch-size 8 --epochs 1'
    command = ['finetune', *tiny.split(), '--no-twin', '--device', 'cpu', '--tensorboard', '--output']
    assert main([*command, str(tmp_path / 'run')]) == 0
    assert len(list((tmp_path / 'run/tensorboard').iterdir())) == 1
    assert (tmp_path / 'run/metrics.csv').read_text().startswith('epoch,lr,train_loss,test_loss,test_top1,seconds\n1,')
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    capsys.readouterr()
    assert main([*command, str(tmp_path / 'other')]) == 2
    assert "--tensorboard needs tensorboard: pip install 'timm-apvit[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / 'other').exists()


def test_progress_tells_images_loss_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, terminal = [0.0], io.StringIO()
    options = {'disable': False, 'file': terminal, 'mininterval': 0, 'ncols': 200, 'dynamic_ncols': False}
    monkeypatch.setattr('tqdm.tqdm', lambda **given: tqdm(**{**given, **options}))
    progress = Progress('apvit_small', updates=4, images=64, epochs=range(1, 3), clock=lambda: now[0])
    with progress.epoch(1):
        for loss in (None, 2.5, None):
            now[0] += 10
            progress.advance(loss)
    shown = terminal.getvalue().split('\r')
    # After 2 of 8 updates in 20 seconds, 60 are left.
    bar = next(text for text in shown if '128/256' in text)
    assert bar.startswith('apvit_small 2/3:  50%')
    assert bar.endswith('images/s, loss 2.500, whole run 0:01:00]')
    assert progress.time_left() == '0:00:50'
