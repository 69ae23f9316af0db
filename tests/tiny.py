"""Tiny models, data and settings, for tests of training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from conftest import move_patches

import timm_apvit
from timm_apvit.cli.main import main
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.learner import Learner
from timm_apvit.finetuning.objectives import create_mixup, create_task
from timm_apvit.finetuning.processes import create_accelerator
from timm_apvit.finetuning.samples import Splits
from timm_apvit.finetuning.settings import Settings

TINY = '--model test_apvit --model-kwargs depth=1 --img-size 32 --num-patches 2 --samples 8 --test-samples 4'
TINY += ' --batch-size 4 --epochs 3 --no-twin --threads 1 --device cpu'
SETTINGS = Settings(epochs=2, batch_size=8, lr=1e-3, layer_decay=1.0, warmup=0.0, workers=0, device='cpu')


def tiny_model(**kwargs: Any) -> timm_apvit.APViT:
    """An APViT whose patches have moved, with 10 classes."""
    torch.manual_seed(0)
    model = timm.create_model('test_apvit', img_size=32, num_classes=10, **{'num_patches': 4, 'depth': 2, **kwargs})
    assert isinstance(model, timm_apvit.APViT)
    move_patches(model, std=0.3)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def tiny_splits(number: int = 16, seed: int = 0) -> Splits:
    """Embedded digits of 32 pixels."""
    return load_embedded_digits(seed, (3, 32, 32), number, number)


def tiny_learner(
    model: torch.nn.Module | None = None, updates_per_epoch: int = 2, teacher: Any = None, **changes: Any
) -> Learner:
    """A learner about to begin its first epoch."""
    settings, model = replace(SETTINGS, **changes), model or tiny_model()
    accelerator = create_accelerator(settings, Path())
    task = create_task(model, settings, tiny_splits(), accelerator.device, teacher)
    learner = Learner(accelerator, model, task, settings, updates_per_epoch, create_mixup(settings, 10))
    learner.begin_epoch(0)
    return learner


def a_batch(number: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(B, 3, 32, 32)`` and labels ``(B,)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 32, 32, generator=generator), torch.arange(number) % 10


def weights_of(directory: Path) -> dict[str, Any]:
    """The weights in the last checkpoint of a run."""
    state: dict[str, Any] = torch.load(directory / 'last/training.pt', weights_only=True)
    return state['model']  # type: ignore[no-any-return]


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run, but for the time that it took."""
    rows = [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in rows]


def run(directory: Path, *more: str) -> int:
    """The exit status of a tiny run in a new folder, with further options."""
    return main(['finetune', *TINY.split(), '--output', str(directory), *more])


def check_kept(directory: Path, error: str) -> None:
    """The first epoch's checkpoint is whole, and people are told how to go on from it."""
    assert f'the last checkpoint is kept in {directory}/last; continue with --resume {directory}' in error
    assert len((directory / 'metrics.jsonl').read_text().splitlines()) == 1
    assert all(value.isfinite().all() for value in weights_of(directory).values())
