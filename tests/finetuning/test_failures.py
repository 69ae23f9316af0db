"""Training that fails: what is said, and what is kept."""

import errno
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import read_metrics, weights_of

from timm_apvit.cli.main import main
from timm_apvit.failures import explain
from timm_apvit.finetuning import learner
from timm_apvit.finetuning import run as run_module
from timm_apvit.finetuning.config import read_config
from timm_apvit.finetuning.folder import CheckpointStore, locked

TINY = '--model test_apvit --model-kwargs depth=1 --img-size 32 --num-patches 2 --samples 8 --test-samples 4'
TINY += ' --batch-size 4 --epochs 3 --no-twin --threads 1 --device cpu'


def run(directory: Path, *more: str) -> int:
    return main(['finetune', *TINY.split(), '--output', str(directory), *more])


@pytest.fixture
def second_epoch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What becomes of the loss in the first update of the second epoch: ``second_epoch['act'] = act``."""
    acts: dict[str, Any] = {}
    update = learner.Learner.update

    def failing(self: learner.Learner, micro_batches: Any, number: int) -> Any:
        criterion = self.task.criterion
        compute = criterion.forward
        if number == 2:
            criterion.forward = lambda *args: acts['act'](compute(*args))
        try:
            return update(self, micro_batches, number)
        finally:
            criterion.forward = compute

    monkeypatch.setattr(learner.Learner, 'update', failing)
    return acts


def check_kept(directory: Path, error: str) -> None:
    """The first epoch's checkpoint is whole, and people are told how to go on from it."""
    assert f'the last checkpoint is kept in {directory}/last; continue with --resume {directory}' in error
    assert len((directory / 'metrics.jsonl').read_text().splitlines()) == 1
    assert all(value.isfinite().all() for value in weights_of(directory).values())


def test_loss_that_is_not_finite_names_the_step(
    second_epoch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_epoch['act'] = lambda loss: loss * float('nan')
    assert run(tmp_path / 'run') == 1
    error = capsys.readouterr().err
    assert error.startswith('error: the training loss became nan in update 3; try a lower --lr; the last')
    check_kept(tmp_path / 'run', error)


@pytest.mark.parametrize('place', ['cpu', 'gpu', 'python'])
def test_out_of_memory_says_what_to_lower(
    place: str, second_epoch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhaust(loss: torch.Tensor) -> torch.Tensor:
        if place == 'cpu':
            return torch.empty(2**55).sum()
        raise {'gpu': torch.OutOfMemoryError, 'python': MemoryError}[place]('CUDA out of memory. Tried to allocate')

    second_epoch['act'] = exhaust
    assert run(tmp_path / 'run') == 1
    error = capsys.readouterr().err
    assert error.startswith('error: out of memory: ')
    for option in ('--batch-size', '--num-patches', '--grad-accum', '--amp', '--grad-checkpointing'):
        assert option in error
    check_kept(tmp_path / 'run', error)
    # Resumed with what was advised, it goes on.
    second_epoch['act'] = lambda loss: loss
    assert main(['finetune', '--resume', str(tmp_path / 'run'), '--grad-accum', '2', '--grad-checkpointing']) == 0


EVERYTHING = (
    '--mixup 0.8 --cutmix 1 --smoothing 0.1 --ema 0.99 --num-patches 1,3 --jitter 0.1 --jitter-epochs 2 --grad-accum 2 '
    '--freeze-backbone-epochs 1 --localizer-lr-scale 0.5 --attention-weight 0.1 --token-weight 0.1 --twin'
)


@pytest.mark.slow
def test_interrupted_run_with_everything_resumes_bit_for_bit(
    second_epoch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = timm.create_model('test_vit', img_size=32, depth=1, num_classes=10)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    options = [*EVERYTHING.split(), '--teacher', str(tmp_path / 'vit.safetensors')]
    second_epoch['act'] = lambda loss: loss
    assert run(tmp_path / 'unbroken', *options) == 0
    second_epoch['act'] = lambda loss: loss * float('nan')
    assert run(tmp_path / 'broken', *options) == 1
    second_epoch['act'] = lambda loss: loss
    assert main(['finetune', '--resume', str(tmp_path / 'broken')]) == 0
    for name in ('last/model.safetensors', 'best/model.safetensors'):
        assert (tmp_path / 'broken' / name).read_bytes() == (tmp_path / 'unbroken' / name).read_bytes()
    twins = [weights_of(tmp_path / each / 'twin') for each in ('broken', 'unbroken')]
    torch.testing.assert_close(*twins, rtol=0, atol=0)
    rows = [
        [{**json.loads(line), 'seconds': 0} for line in (tmp_path / each / 'metrics.jsonl').read_text().splitlines()]
        for each in ('broken', 'unbroken')
    ]
    assert rows[0] == rows[1]
    assert {'test_top1', 'test_top1_1', 'test_top1_3', 'test_loss_3'} <= rows[0][0].keys()
    exported = timm.create_model(f'local-dir:{tmp_path / "broken/best"}', pretrained=True)
    assert exported.num_patches == 3
    state = torch.load(tmp_path / 'broken/last/training.pt', weights_only=True)
    assert torch.equal(
        state['ema']['head.weight'], load_file(tmp_path / 'broken/last/model.safetensors')['head.weight']
    )
    assert not torch.equal(state['ema']['head.weight'], state['model']['head.weight'])
    summary = json.loads((tmp_path / 'broken/summary.json').read_text())
    assert [budget['num_patches'] for budget in summary['test_apvit']['budgets'].values()] == [1, 3]
    assert summary['test_apvit']['top1'] == pytest.approx(rows[0][-1]['test_top1'])
    assert summary['fixed grid']['num_patches'] >= 3
    assert capsys.readouterr().out.count('\ntest_apvit        3  ') == 2


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file become larger than so many bytes, as on a disk that is full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize('exports', [True, False])
def test_full_disk_leaves_the_checkpoint_before(exports: bool, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = {'w': torch.arange(50_000.0)}

    def export(directory: Path) -> None:
        (directory / 'model').write_bytes(bytes(200_000 if exports else 10))

    store.save('epoch-1', state, 'epoch-1', export)
    with (
        disk_of(100_000),
        pytest.raises(OSError, match=r'epoch-2 into .*, where \d+ MiB are free: .*is whole'),
    ):
        store.save('epoch-2', {'w': state['w'] + 1}, 'epoch-2', export)
    loaded = store.load()
    assert loaded is not None
    assert torch.equal(loaded['w'], state['w'])
    assert {path.name for path in store.versions.iterdir()} == {'epoch-1'}


@pytest.mark.parametrize(
    'problem',
    [
        OSError(errno.ENOSPC, 'No space left on device'),
        RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed'),
        SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
)
def test_full_disk_ends_the_run_in_one_sentence(
    problem: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = run_module.save_pretrained, []

    def filling(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise problem
        save(*args, **kwargs)

    monkeypatch.setattr(run_module, 'save_pretrained', filling)
    assert run(tmp_path / 'run') == 1
    error = capsys.readouterr().err
    assert error.startswith('error: cannot write the checkpoint epoch-0002 into ')
    assert str(problem).splitlines()[0] in error
    check_kept(tmp_path / 'run', error)
    assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 0


def test_full_disk_is_named_wherever_it_is_met() -> None:
    assert explain(OSError(errno.ENOSPC, 'No space left on device', 'metrics'), '').startswith('the disk is full: ')
    assert explain(MemoryError(), 'lower it').endswith('; lower it')
    assert explain(RuntimeError('[...gloo/transport/tcp/pair.cc] Connection closed by peer'), '', True).startswith(
        'another process of the training ended or does not answer: '
    )
    assert explain(RuntimeError('mat1 and mat2'), '', True) == 'mat1 and mat2'


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


def test_where_there_is_no_terminal_lines_tell_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / 'run', '--log-every', '1') == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ': update ' in line]
    assert len(lines) == 6
    assert lines[2].startswith('test_apvit 2/3: update 1 of 2, loss 2.')
    assert lines[2].endswith(' left')


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / 'run', '--epochs', '1') == 0
    before = (tmp_path / 'run/metrics.jsonl').read_text()
    with locked(tmp_path / 'run'):
        assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 2
    assert 'expected the folder of a run that no process trains in, got' in capsys.readouterr().err
    assert (tmp_path / 'run/metrics.jsonl').read_text() == before
    assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 0


def test_bad_input_of_another_process_is_told_by_the_main_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ['expected a device that is there']
    monkeypatch.setattr('accelerate.utils.gather_object', lambda problem: [*problem, *problems])
    assert run(tmp_path / 'run') == 2
    assert capsys.readouterr().err == 'error: process 1: expected a device that is there\n'
    assert not (tmp_path / 'run').exists()


def test_options_of_a_run_are_those_it_was_given(tmp_path: Path) -> None:
    assert run(tmp_path / 'run', '--epochs', '1', '--grad-accum', '2') == 0
    options = read_config(tmp_path / 'run/config.yaml')
    assert options['grad_accum'] == 2
    assert options['num_patches'] == (2,)
    assert 'timeout' not in options
