"""Training that fails: what is said, and what is kept."""

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import check_kept, run, weights_of

from timm_apvit.cli.main import main
from timm_apvit.failures import explain
from timm_apvit.finetuning import run as run_module
from timm_apvit.finetuning.checkpoints import CheckpointStore
from timm_apvit.finetuning.config import read_config
from timm_apvit.finetuning.processes import in_all_processes


def test_loss_that_is_not_finite_names_the_step(
    second_epoch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_epoch['act'] = lambda loss: loss * float('nan')
    assert run(tmp_path / 'run') == 1
    error = capsys.readouterr().err
    assert error.startswith('error: the training loss became nan in update 3; try a lower --lr; the last')
    check_kept(tmp_path / 'run', error)


def test_failure_before_anything_is_learnt_leaves_nothing_in_the_way(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / 'train/cat').iterdir():
        path.write_bytes(path.read_bytes()[:-60])
    words = ['finetune', str(folder), '--model', 'test_apvit', '--img-size', '32', '--epochs', '1', '--device', 'cpu']
    assert main([*words, '--batch-size', '4', '--workers', '0', '--output', str(tmp_path / 'run')]) == 1
    assert capsys.readouterr().err.endswith('; nothing was written\n')
    assert not (tmp_path / 'run').exists()


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
    for words in ('CUDA error: out of memory', 'CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate'):
        assert explain(RuntimeError(words), 'lower it').endswith('; lower it')
    assert explain(MemoryError(), 'lower it').endswith('; lower it')
    assert explain(RuntimeError('[...gloo/transport/tcp/pair.cc] Connection closed by peer'), '', True).startswith(
        'another process of the training ended or does not answer: '
    )
    assert explain(RuntimeError('mat1 and mat2'), '', True) == 'mat1 and mat2'


def test_what_a_configuration_says_of_the_hub_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'c.yaml').write_text('push_to_hub: me/x\nprivate: true\npush_picture: false\n')
    pushed: list[dict[str, Any]] = []
    monkeypatch.setattr(run_module, 'check_access', lambda name: None)
    monkeypatch.setattr('timm_apvit.cli.finetune.prepared_push', lambda options: lambda: pushed.append(options))
    monkeypatch.setattr('timm_apvit.cli.finetune.tell', lambda _: None)
    assert run(tmp_path / 'run', '--config', str(tmp_path / 'c.yaml'), '--epochs', '1') == 0
    assert pushed == [{'directory': tmp_path / 'run', 'repo_id': 'me/x', 'private': True, 'picture': False}]


def test_where_there_is_no_terminal_lines_tell_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / 'run', '--log-every', '1') == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ': update ' in line]
    assert len(lines) == 6
    assert lines[2].startswith('test_apvit 2/3: update 1 of 2, loss 2.')
    assert lines[2].endswith(' left')


def test_bad_input_of_another_process_is_told_by_the_main_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ['expected a device that is there']
    monkeypatch.setattr('accelerate.utils.gather_object', lambda problem: [*problem, *problems])
    assert run(tmp_path / 'run') == 2
    assert capsys.readouterr().err == 'error: process 1: expected a device that is there\n'
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('rank', [0, 1])
def test_what_fails_in_one_process_fails_in_all(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError('on purpose')

    monkeypatch.setenv('RANK', str(rank))
    monkeypatch.setattr('accelerate.utils.gather_object', lambda problem: [*problem, None])
    with pytest.raises(RuntimeError if rank == 0 else SystemExit):
        in_all_processes(fail)
    monkeypatch.setattr('accelerate.utils.gather_object', lambda problem: [None, *problem])
    assert in_all_processes(lambda: 3) == 3


def test_options_of_a_run_are_those_it_was_given(tmp_path: Path) -> None:
    assert run(tmp_path / 'run', '--epochs', '1', '--grad-accum', '2') == 0
    options = read_config(tmp_path / 'run/config.yaml')
    assert options['grad_accum'] == 2
    assert options['num_patches'] == (2,)
    assert 'timeout' not in options
