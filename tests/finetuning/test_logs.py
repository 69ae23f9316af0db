"""Metrics in files, and the bar of progress."""

import csv
import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tqdm import tqdm

from timm_apvit.cli.main import main
from timm_apvit.finetuning.checkpoints import write_metrics
from timm_apvit.finetuning.progress import Progress

ROWS = [
    {'epoch': 1, 'lr': 0.1, 'test_top1': 0.25},
    {'epoch': 2, 'lr': 1e-05, 'test_top1': 1 / 3, 'test_top1_16': 0.5},
]


@pytest.mark.parametrize('number', [1, 2])
def test_metrics_are_the_same_in_both_files_and_whole(number: int, tmp_path: Path) -> None:
    for written in range(1, number + 1):
        write_metrics(tmp_path, ROWS[:written])
    assert [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == ROWS[:number]
    with (tmp_path / 'metrics.csv').open(newline='') as file:
        read = list(csv.DictReader(file))
    assert [{name: float(text) for name, text in row.items() if text} for row in read] == ROWS[:number]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.csv', 'metrics.jsonl']


@pytest.mark.slow
def test_a_tracker_has_every_epoch_once_also_of_a_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('tensorboard', reason='the tracker is TensorBoard')
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    tiny = '--model test_apvit --img-size 32 --num-patches 2 --samples 8 --test-samples 8 --batch-size 8 --epochs 1'
    command = ['finetune', *tiny.split(), '--twin', '--device', 'cpu', '--log-with', 'tensorboard', '--output']
    assert main([*command, str(tmp_path / 'run')]) == 0
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--epochs', '2']) == 0
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / 'run')).Reload()
    events = [
        (name, e.step)
        for run in shown.Runs()
        for name in shown.Runs()[run]['scalars']
        for e in shown.Scalars(run, name)
    ]
    assert sorted(step for each, step in events if each == 'test_top1') == [1, 1, 2, 2]  # of both models
    assert sorted(step for each, step in events if each == 'patch_shift') == [1, 2]
    assert {Path(name).parts[0] for name in shown.Runs()} >= {'test_apvit', 'fixed-grid'}
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name, find=find_spec: None if name == 'wandb' else find(name)
    )
    capsys.readouterr()
    assert main(['finetune', *tiny.split(), '--log-with', 'wandb', '--output', str(tmp_path / 'other')]) == 2
    assert '--log-with wandb needs wandb: pip install wandb' in capsys.readouterr().err
    assert not (tmp_path / 'other').exists()


def test_progress_tells_images_loss_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, terminal = [0.0], io.StringIO()
    options = {'disable': False, 'file': terminal, 'mininterval': 0, 'ncols': 200, 'dynamic_ncols': False}
    monkeypatch.setattr('timm_apvit.finetuning.progress.tqdm', lambda **given: tqdm(**{**given, **options}))
    progress = Progress('apvit_small', updates=4, images=64, epochs=3, done=4, clock=lambda: now[0])
    with progress.bar:
        for loss in (None, 2.5, None):
            now[0] += 10
            progress.advance(loss)
    shown = terminal.getvalue().split('\r')
    # After 2 of 8 updates in 20 seconds, 60 are left.
    bar = next(text for text in shown if '384/768' in text)
    assert bar.startswith('apvit_small:  50%')
    assert bar.endswith('images/s, epoch 2/3, loss 2.500, 0:01:00 left]')
    assert progress.time_left() == '0:00:50'
