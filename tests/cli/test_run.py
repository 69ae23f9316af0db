"""Scripts run as Python runs them, with our models registered, also under torchrun and in processes that they spawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}

# What a script sees of itself, and what a worker that it spawns sees and sends back.
FACTS = """
import json, sys
from dataclasses import dataclass
from torch.utils.data import DataLoader
import timm, beside


@dataclass
class Seen:
    name: str
    registered: bool


class Data:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Seen(__name__, timm.is_model('test_apvit'))


if __name__ == '__main__':
    seen = Seen(__name__, timm.is_model('test_apvit'))
    loader = DataLoader(Data(), batch_size=None, num_workers=1, multiprocessing_context='spawn')
    worker = next(iter(loader))
    assert type(worker) is Seen
    print(json.dumps({
        'script': [__name__, __file__, sys.argv, sys.path[0], repr(__spec__), __package__, beside.__name__],
        'worker': worker.name,
        'main': sys.modules['__main__'].Seen is Seen,
        'registered': [seen.registered, worker.registered],
    }))
"""

ENDINGS = """
import sys
def fail(): raise ValueError('on purpose')
if __name__ == '__main__':
    {'error': fail, 'status': lambda: sys.exit(3), 'text': lambda: sys.exit('no'), 'ends': lambda: None}[sys.argv[1]]()
"""
# Importing torch takes seconds: one process imports it, and its children run the command.
RUN_EACH = """
import json, os, sys
from timm_apvit.cli.main import main

results = []
for arguments in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 2)
        os.close(write)
        sys.exit(main(['run', *arguments]))
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    results.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
print(json.dumps(results))
"""

# As timm's train.py does it.
TRAIN = """
import argparse, os
import torch
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2

parser = argparse.ArgumentParser()
parser.add_argument('data_dir')
parser.add_argument('--model')
parser.add_argument('--device', default='cuda')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)


def main():
    args = parser.parse_args()
    device = utils.init_distributed_device(args)
    model = create_model(args.model, num_classes=2, **args.model_kwargs).to(device)
    config = resolve_data_config(vars(args), model=model)
    dataset = create_dataset('', root=args.data_dir)
    loader = create_loader(dataset, config['input_size'], 2, is_training=True, num_workers=1,
                           distributed=args.distributed, use_prefetcher=False, device=device)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    task = torch.nn.parallel.DistributedDataParallel(model)
    for image, label in loader:
        torch.nn.functional.cross_entropy(task(image), label).backward()
        optimizer.step()
    # At once: both processes write into one pipe, and print may write the end of a line by itself.
    line = f'rank {args.rank} of {args.world_size}: {model.num_patches} patches'
    os.write(1, line.encode() + bytes([10]))
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
"""


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options
    )


def test_script_sees_what_it_sees_without_us_and_its_workers_have_our_models(tmp_path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'facts.py').write_text(FACTS)
    (folder / 'beside.py').write_text('')
    arguments = ['scripts/facts.py', '--', '--help', '--', '-x', 'a b']
    ran, plain = (python(*start, *arguments, cwd=tmp_path) for start in (('-m', 'timm_apvit', 'run'), ()))
    assert ran.returncode == plain.returncode == 0, ran.stderr
    ours, theirs = json.loads(ran.stdout), json.loads(plain.stdout)
    assert (ours.pop('registered'), theirs.pop('registered')) == ([True, True], [False, False])
    assert ours == theirs
    assert ours['script'][:3] == ['__main__', str(folder / 'facts.py'), arguments]
    assert ours['worker'] == '__mp_main__'


def test_ends_as_the_script_does(tmp_path):
    (tmp_path / 'ends.py').write_text(ENDINGS)
    (tmp_path / 'broken.py').write_text('x = (1,\n')
    cases = [['ends.py', how] for how in ('error', 'status', 'text', 'ends')] + [['broken.py']]
    process = python('-c', RUN_EACH, json.dumps(cases), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    plain = [python(*case, cwd=tmp_path) for case in cases]
    assert json.loads(process.stdout) == [[each.returncode, each.stderr] for each in plain]
    assert [each.returncode for each in plain] == [1, 3, 1, 0, 1]


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'the following arguments are required: SCRIPT (see'),
    (['none.py'], "expected the file of a Python script, got 'none.py', which does not exist"),
    (['.'], "expected the file of a Python script, got '.', a folder"),
])  # fmt: skip
def test_rejects_what_is_no_file(arguments, message, tmp_path, monkeypatch, capsys):
    from timm_apvit.cli.main import main

    monkeypatch.chdir(tmp_path)
    try:
        status = main(['run', *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert capsys.readouterr().err.startswith(f'error: {message}')


def test_runs_under_torchrun(tmp_path):
    (tmp_path / 'train.py').write_text(TRAIN)
    for n in range(8):
        path = tmp_path / f'data/{n % 2}/{n}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 40), (30 * n, 0, 0)).save(path)
    process = python(
        *('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_apvit', 'run', 'train.py'),
        *('data', '--device', 'cpu', '--model', 'test_apvit', '--model-kwargs', 'img_size=32', 'num_patches=3'),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    said = sorted(line for line in process.stdout.splitlines() if line.startswith('rank'))
    assert said == ['rank 0 of 2: 3 patches', 'rank 1 of 2: 3 patches']
