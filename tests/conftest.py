"""Shared fixtures: photographs, real weights, trained-looking models."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from images import write_images
from torch import Tensor, nn

import timm_apvit
from timm_apvit.pictures.images import image_config

# Tests are small: a second thread costs more than it gives, and much more on a busy machine.
torch.set_num_threads(1)

DINOV2 = 'vit_small_patch14_dinov2.fp16.safetensors'
CROWD = 0.6
# Arguments of a model whose patches crowd.
CROWDING: dict[str, Any] = {
    'localizer': {'name': 'saliency', 'crowd': CROWD, 'side': 96, 'width': 16}, 'num_patches': 36, 'img_size': 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _parts() -> Iterator[None]:
    """Forget what a test registers."""
    tables = timm_apvit.TRANSFORMS, timm_apvit.LAYOUTS, timm_apvit.LOCALIZERS
    before = [dict(table) for table in tables]
    yield
    for table, parts in zip(tables, before, strict=True):
        table.clear()
        table.update(parts)


@pytest.fixture(scope='session')
def photographs() -> list[Tensor]:
    """Photographs that scikit-image ships: each ``(1, 3, H, W)`` in [0, 1]."""
    data = pytest.importorskip('skimage.data', reason='photographs come from scikit-image')
    images = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return [torch.from_numpy(np.ascontiguousarray(i)).permute(2, 0, 1)[None].float() / 255 for i in images]


@pytest.fixture(scope='session')
def dinov2_file() -> str:
    """Real DINOv2 ViT-S/14 weights in timm's layout: the file $APVIT_DINOV2, or in ``../shared/data``."""
    default = Path(__file__).parents[2] / 'shared' / 'data' / DINOV2
    path = Path(os.environ.get('APVIT_DINOV2', default))
    if not path.is_file():
        pytest.skip(f'set APVIT_DINOV2 to a file {DINOV2} for tests on real weights')
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images each of two classes, to train and to test."""
    for n, name in enumerate(('train/cat', 'train/dog', 'val/cat', 'val/dog')):
        write_images(tmp_path / 'images' / name, 3, seed=n)
    return tmp_path / 'images'


@pytest.fixture
def second_epoch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What becomes of the loss in the first update of the second epoch: ``second_epoch['act'] = act``."""
    from timm_apvit.finetuning.learner import Learner

    acts: dict[str, Any] = {}
    update = Learner.update

    def failing(self: Any, micro_batches: Any, number: int) -> Any:
        criterion = self.task.criterion
        compute = criterion.forward
        if number == 2:
            criterion.forward = lambda *args: acts['act'](compute(*args))
        try:
            return update(self, micro_batches, number)
        finally:
            criterion.forward = compute

    monkeypatch.setattr(Learner, 'update', failing)
    return acts


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Run a benchmark's main with arguments, and return what it writes."""
    threads = torch.get_num_threads()

    def run(module, *arguments):
        output = tmp_path / 'found.json'
        monkeypatch.setattr(sys, 'argv', [module.__file__, *arguments, '--output', str(output)])
        module.main()
        return json.loads(output.read_text())

    yield run
    torch.set_num_threads(threads)


def randomise(model: nn.Module, seed: int = 0, std: float = 0.04) -> nn.Module:
    """Give a model weights as if it had been trained: every parameter random, the position embedding far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name == 'pos_embed' else std
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def vit_and_apvit(vit: str, apvit: str, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """A ViT with weights as if trained, and an APViT made from it, both in eval mode."""
    model = randomise(timm.create_model(vit, **kwargs)).eval()
    adaptive = timm.create_model(apvit, **kwargs).eval()
    adaptive.load_state_dict(model.state_dict())
    return model, adaptive


def move_patches(model: nn.Module, std: float = 1.0) -> nn.Module:
    """Make the localisation network predict transforms that differ by patch and image."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'localizer.fields' in name or 'geometry_embed' in name:
                parameter.normal_(std=std)
    return model


def relative(difference: Tensor, reference: Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    return (difference.float().abs().max() / reference.float().std()).item()


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the standard deviation of what is expected."""
    assert actual.shape == expected.shape
    assert relative(actual - expected, expected) <= 1e-4


def create(name: str = 'test_apvit', **kwargs: object) -> nn.Module:
    """An APViT in eval mode whose patches have moved."""
    return move_patches(timm.create_model(name, **kwargs), std=0.3).eval()


def learn(optimizer: torch.optim.Optimizer, steps: int, loss_of: Callable[[], Tensor]) -> list[float]:
    """Take steps down a loss, and return what it was before each."""
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def images(*shape: int) -> Tensor:
    """The same images each time, of standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def normalised(model: nn.Module, image: Tensor) -> Tensor:
    """An image ``(C, H, W)`` of [0, 1] as a batch that a model takes."""
    config = image_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return ((image - mean) / std)[None]


def refused(run: Callable[..., int], arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command with arguments that must be refused with a line; return it."""
    try:
        status = run(*arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else -1
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    return err
