"""Two processes train what one would, and fail together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import read_metrics, weights_of

from timm_apvit.cli.main import main
from timm_apvit.finetuning.processes import create_accelerator
from timm_apvit.finetuning.settings import Settings

pytestmark = pytest.mark.slow

# 4 updates an epoch.
TINY = '--model test_apvit --model-kwargs depth=2 --img-size 32 --samples 64 --test-samples 15 --batch-size 16'
TINY += ' --epochs 5 --threads 1 --device cpu --no-twin --num-patches 4,16'
TINY += ' --ema 0.9 --freeze-backbone-epochs 1'

# Ends the second process, or stops it, in its n-th update of the weights.
LOST = """
import os, signal, sys, torch
from timm_apvit.__main__ import main
step, left, how = torch.optim.AdamW.step, [int(sys.argv.pop(1))], sys.argv.pop(1)
def losing_step(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0 and os.environ['RANK'] == '1':
        os.kill(os.getpid(), getattr(signal, how))
    return step(*args, **kwargs)
torch.optim.AdamW.step = losing_step
sys.exit(main())
"""


def assert_same_run(first: Path, second: Path) -> None:
    rows, expected = read_metrics(first), read_metrics(second)
    assert len(rows) == len(expected) == 5
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            one_image = 1.01 / 15  # whose two likeliest classes were alike to the last bits
            assert value == pytest.approx(other[name], abs=one_image if 'top1' in name else 1e-4), name
    torch.testing.assert_close(weights_of(first), weights_of(second), rtol=0, atol=1e-3)


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('runs') / 'alone'
    assert main(['finetune', *TINY.split(), '--output', str(directory)]) == 0
    return directory


def lose_second_process(update: int, how: str, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run two processes, of which the second gets a signal; wait for the first and then end the second."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        of_rank = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        environment = {**os.environ, **{name: str(value) for name, value in of_rank.items()}}
        command = [sys.executable, '-c', LOST, str(update), how, 'finetune', *TINY.split(), *arguments]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    results = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            for other in processes:
                other.kill()
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def test_two_processes_give_the_result_of_one(alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / 'together'
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '-m', 'timm_apvit']
    # Micro-batches within the processes change nothing either.
    command = [*launch, 'finetune', *TINY.split(), '--grad-accum', '2', '--output', str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    assert 'Warning' not in result.stderr
    # Only the main process tells of it.
    assert result.stdout.count('epoch   5/5') == 1
    assert_same_run(directory, alone)


def test_two_processes_fit_a_glance_as_one_does(tmp_path: Path) -> None:
    glance = "localizer={'name': 'glance', 'blocks': 1, 'grid': 4, 'answer_drop': 0}"
    quiet = ['--model-kwargs', glance, 'window_jitter=0', 'whole_share=0']  # noise is each process' own
    arguments = [*TINY.split(), '--epochs', '1', '--freeze-backbone-epochs', '0', '--glance-epochs', '3', *quiet]
    assert main(['finetune', *arguments, '--output', str(tmp_path / 'alone')]) == 0
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', '-m', 'timm_apvit']
    command = [*launch, 'finetune', *arguments, '--output', str(tmp_path / 'together')]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    one, two = weights_of(tmp_path / 'alone'), weights_of(tmp_path / 'together')
    assert one['patch_embed.patching.localizer.classes.0.weight'].abs().max() > 1e-3
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3)


def test_killed_process_ends_the_run_which_then_resumes(alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / 'killed'
    main_process, lost = lose_second_process(9, 'SIGKILL', '--output', str(directory))
    assert lost.returncode == -9
    assert main_process.returncode == 1
    assert 'error: another process of the training ended or does not answer' in main_process.stderr
    assert f'continue with --resume {directory}' in main_process.stderr
    assert len(read_metrics(directory)) == 2
    # One process continues what two began.
    assert main(['finetune', '--resume', str(directory)]) == 0
    assert_same_run(directory, alone)


def test_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    directory = tmp_path / 'hung'
    main_process, _ = lose_second_process(9, 'SIGSTOP', '--output', str(directory), '--timeout', '0.1')
    assert main_process.returncode == 1
    assert 'does not answer' in main_process.stderr
    assert len(read_metrics(directory)) == 2


def test_several_processes_take_no_single_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(ValueError, match=r"expected --device cuda for several processes, .* got 'cuda:1'"):
        create_accelerator(Settings(device='cuda:1'), Path())
