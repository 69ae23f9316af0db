"""Fully sharded over two processes (FSDP2), a model learns what it learns in one."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import create
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.slow

KWARGS = {'num_classes': 5, 'depth': 2, 'img_size': 96, 'num_patches': 9, 'transform': 'projective'}

# Each process builds the model on the meta device, shards block after block and the rest, takes the weights of a file,
# and makes its half of two steps; the first one writes what all have learnt.
SHARDED = f"""
import os, sys, timm, timm_apvit, torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

given, written = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group('gloo')
rank, mesh = torch.distributed.get_rank(), init_device_mesh('cpu', (2,))
start, image, label = torch.load(given, weights_only=True)

def sharded(**options):
    with torch.device('meta'):
        model = timm.create_model('test_apvit', **{KWARGS!r}).double()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    model.to_empty(device='cpu')
    set_model_state_dict(model, start, options=StateDictOptions(full_state_dict=True))
    return model.train()

def loss_of(model):
    half = slice(2 * rank, 2 * rank + 2)
    loss = torch.nn.functional.cross_entropy(model(image[half]).double(), label[half])
    loss.backward()
    return loss.detach()

model = sharded()
assert all(p.to_local().shape[0] < p.shape[0] for p in model.parameters() if p.shape[0] > 1)
optimizer = torch.optim.SGD(model.parameters(), 0.02)
losses = []
for _ in range(2):
    optimizer.zero_grad()
    losses.append(loss_of(model))
    optimizer.step()
rounded = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
losses.append(loss_of(rounded))
losses = torch.stack(losses)
torch.distributed.all_reduce(losses)
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    torch.save((state, losses / 2), written)
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of Gloo that still holds a tensor would abort an interpreter that ends
"""


def test_sharded_steps_are_those_of_one_process(tmp_path: Path) -> None:
    # In float64: sums in another order would move float32 samples over a texel's edge, where a bilinear read's gradient
    # jumps, by chance and by processor.
    model, label = create(**KWARGS).double().train(), torch.arange(4)
    image = torch.randn(4, 3, 96, 96, dtype=torch.float64)
    start = copy.deepcopy(model.state_dict())
    torch.save((start, image, label), tmp_path / 'given.pt')
    (tmp_path / 'sharded.py').write_text(SHARDED)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    command = [*launch, tmp_path / 'sharded.py', tmp_path / 'given.pt', tmp_path / 'written.pt']
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert result.returncode == 0, result.stderr
    state, losses = torch.load(tmp_path / 'written.pt', weights_only=True)

    optimizer, expected = torch.optim.SGD(model.parameters(), 0.02), []
    for _ in range(2):
        optimizer.zero_grad()
        expected.append(cross_entropy(model(image), label))
        expected[-1].backward()
        optimizer.step()
    torch.testing.assert_close(losses[:2], torch.stack(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(losses[2], expected[0], rtol=0, atol=0.05)  # in bfloat16
    for name, value in model.state_dict().items():
        assert (state[name] - value).norm() <= 1e-6 * (value - start[name]).norm() + 1e-12, name
    moved = (state['head.weight'] - start['head.weight']).abs().max()
    assert moved > 0.001
