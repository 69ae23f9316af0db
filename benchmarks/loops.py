"""Does a model learn alike in every loop? Five loops, each training the same model on the same images.

    python benchmarks/loops.py [--loops command timm ...] [--seeds 0 1] [--images 4000] [--epochs 4] [--output FILE]

The images are the embedded digits, the model and the schedule those of `timm-apvit finetune` without arguments, but for
half of its warm-up. The loops are that command; one of timm's own parts as its train.py has them; and those of
accelerate, Lightning and transformers, each in a process of its own. Needs the extra `ecosystem`.
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import timm
import torch
from environment import counted, new_file, write_report
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.evaluation import evaluate
from timm_apvit.finetuning.preparation import EMBEDDED, EMBEDDED_MODEL, EMBEDDED_MODEL_KWARGS
from timm_apvit.finetuning.samples import Splits
from timm_apvit.learning.parameter_groups import param_groups

BATCH_SIZE, LR, WARMUP, CLIP = 32, 1e-3, 0.1, 1.0


class Epochs(IterableDataset[Any]):
    """The samples of all epochs, each in an order of its own."""

    def __init__(self, splits: Splits, epochs: int) -> None:
        self.train, self.epochs = splits.train, epochs

    def __len__(self) -> int:
        return self.epochs * (len(self.train) // BATCH_SIZE) * BATCH_SIZE

    def __iter__(self) -> Iterator[Any]:
        for epoch in range(self.epochs):
            for images, labels in self.train.training_batches(epoch, BATCH_SIZE):
                yield from zip(images, labels, strict=True)


def create_model() -> Any:
    """The model of the command without arguments."""
    kwargs = {**EMBEDDED, **EMBEDDED_MODEL_KWARGS, 'num_patches': EMBEDDED['num_patches'][0]}
    return timm.create_model(EMBEDDED_MODEL, num_classes=10, **kwargs)


def optimiser_and_schedule(model: Any, steps: int) -> tuple[Any, Any]:
    """PyTorch's own, with the command's rates."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=LR))

    def factor(step: int) -> float:
        if step < WARMUP * steps:
            return step / (WARMUP * steps)
        return 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def by_command(_: Any, splits: Splits, epochs: int, seed: int) -> Any:
    """``timm-apvit finetune``."""
    from timm_apvit.cli.main import main

    with tempfile.TemporaryDirectory() as folder:
        options = ['--samples', str(len(splits.train)), '--epochs', str(epochs), '--seed', str(seed), '--no-twin']
        options += ['--warmup', str(WARMUP * epochs)]
        if main(['finetune', *options, '--device', 'cpu', '--threads', '1', '--output', f'{folder}/run']):
            raise RuntimeError('expected the command to train, got an error')
        return timm.create_model(f'local-dir:{folder}/run/last', pretrained=True)


def by_timm(model: Any, splits: Splits, epochs: int, seed: int) -> Any:
    """Timm's task, optimiser and schedule, in the order of its train.py."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask

    task = ClassificationTask(model, verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LR, weight_decay=0.05)
    updates = len(splits.train) // BATCH_SIZE
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=WARMUP * epochs, warmup_lr=0.0, step_on_epochs=False,
        updates_per_epoch=updates,
    )  # fmt: skip
    task.train()
    for step, batch in enumerate(DataLoader(Epochs(splits, epochs), BATCH_SIZE)):
        schedule.step_update(step)
        task(*batch)['loss'].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model


def by_accelerate(model: Any, splits: Splits, epochs: int, seed: int) -> Any:
    """Accelerate's loop."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    data = Epochs(splits, epochs)
    optimizer, schedule = optimiser_and_schedule(model, len(data) // BATCH_SIZE)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, DataLoader(data, BATCH_SIZE), schedule)
    for images, labels in loader:
        accelerator.backward(cross_entropy(model(images), labels))
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def by_lightning(model: Any, splits: Splits, epochs: int, seed: int) -> Any:
    """Lightning's Trainer."""
    import lightning

    data = Epochs(splits, epochs)

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimiser_and_schedule(model, len(data) // BATCH_SIZE)
            return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': schedule, 'interval': 'step'}}

    quiet = {
        'logger': False,
        'enable_checkpointing': False,
        'enable_progress_bar': False,
        'enable_model_summary': False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', gradient_clip_val=CLIP, **quiet)
    trainer.fit(Classifier(), DataLoader(data, BATCH_SIZE))
    return model


def by_transformers(model: Any, splits: Splits, epochs: int, seed: int) -> Any:
    """The Trainer of transformers."""
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    import timm_apvit

    data = Epochs(splits, epochs)

    def collate(samples: Any) -> dict[str, Any]:
        images, labels = zip(*samples, strict=True)
        return {'pixel_values': torch.stack(images), 'labels': torch.stack(labels)}

    with tempfile.TemporaryDirectory() as folder:
        timm_apvit.save_pretrained(model, f'{folder}/model')
        wrapped = AutoModelForImageClassification.from_pretrained(f'{folder}/model')
        steps = len(data) // BATCH_SIZE
        options = TrainingArguments(
            f'{folder}/run', max_steps=steps, per_device_train_batch_size=BATCH_SIZE, report_to='none', use_cpu=True,
            max_grad_norm=CLIP, save_strategy='no', disable_tqdm=True, remove_unused_columns=False, seed=seed,
        )  # fmt: skip
        optimisers = optimiser_and_schedule(wrapped.timm_model, steps)
        Trainer(wrapped, options, train_dataset=data, data_collator=collate, optimizers=optimisers).train()
        return wrapped.timm_model


LOOPS = {
    'command': by_command,
    'timm': by_timm,
    'accelerate': by_accelerate,
    'lightning': by_lightning,
    'transformers': by_transformers,
}


def learn(job: tuple[str, int, int, int]) -> dict[str, Any]:
    """Train by a loop and test."""
    loop, seed, images, epochs = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    size = (EMBEDDED_MODEL_KWARGS['in_chans'], EMBEDDED['img_size'], EMBEDDED['img_size'])
    splits, model = load_embedded_digits(seed, size, images), create_model()
    begun = time.monotonic()
    trained = LOOPS[loop](model.train(), splits, epochs, seed)
    seconds = round(time.monotonic() - begun, 1)
    return {'loop': loop, 'seed': seed, 'seconds': seconds, **evaluate(trained, splits, BATCH_SIZE)}


def main() -> None:
    """Train, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--loops', nargs='+', choices=LOOPS, default=list(LOOPS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    parser.add_argument('--images', type=counted, default=4000, help='of an epoch')
    parser.add_argument('--epochs', type=counted, default=4)
    parser.add_argument('--output', type=new_file)
    args = parser.parse_args()
    rows = []
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        jobs = [(loop, seed, args.images, args.epochs) for seed in args.seeds for loop in args.loops]
        for row in pool.imap(learn, jobs, chunksize=1):
            rows.append(row)
            sys.stdout.write(json.dumps(row) + '\n')
            sys.stdout.flush()
    for loop in args.loops:
        found = torch.tensor([row['top1'] for row in rows if row['loop'] == loop])
        sys.stdout.write(f'{loop:<14}{found.mean():.3f} ({", ".join(f"{value:.3f}" for value in found)})\n')
    if args.output:
        write_report(args.output, 1, images=args.images, epochs=args.epochs, rows=rows)


if __name__ == '__main__':
    main()
