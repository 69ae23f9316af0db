"""How to train: the options of the engine, all of them settled."""

from typing import NamedTuple

from timm_apvit.finetuning.parsing import Budget


class Schedule(NamedTuple):
    """How to train.

    Attributes:
        epochs: number of epochs.
        batch_size: images of an update, over all processes and pieces; of test batches too.
        lr: learning rate at its peak.
        weight_decay: of AdamW.
        layer_decay: factor of the learning rate from one block to the one below it; 1: the same rate everywhere.
        warmup: epochs over which the learning rate rises, of ``epochs``; a cosine follows.
        seed: of the order and augmentation of the data and of what is random in the model.
        workers: processes that load data; 0: none but this one.
        device: where to train.
        glance_epochs: over the glances, in which a model with ``localizer='glance'`` is fitted to them first.
        num_patches: budgets, of which each update takes one at random; none: the model's own.
        mixup: alpha of mixup; 0: none.
        cutmix: alpha of cutmix; 0: none.
        mixup_prob: share of the updates that mix.
        smoothing: of the labels.
        ema: decay of the averaged weights, which are then what is evaluated and exported; None: no average.
        localizer_lr_scale: factor on the rate of what a ViT does not have.
        backbone_lr_scale: factor on the rate of everything else but the classifier.
        freeze_backbone_epochs: first epochs in which the backbone does not learn.
        freeze_localizer_epochs: first epochs in which what a ViT does not have does not learn.
        jitter: of the model in the first update; None: the model's own.
        jitter_epochs: over which ``jitter`` falls to 0; None: it stays.
        amp: ``'bfloat16'``, ``'float16'``, or None for float32.
        grad_accum: pieces in which a process computes its part of a batch.
        grad_checkpointing: whether activations are computed twice rather than kept.
        compile: whether the model's blocks are compiled.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float
    warmup: float
    seed: int
    workers: int
    device: str
    glance_epochs: int = 0
    num_patches: tuple[Budget, ...] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    smoothing: float = 0.0
    ema: float | None = None
    localizer_lr_scale: float = 1.0
    backbone_lr_scale: float = 1.0
    freeze_backbone_epochs: int = 0
    freeze_localizer_epochs: int = 0
    jitter: float | None = None
    jitter_epochs: int | None = None
    amp: str | None = None
    grad_accum: int = 1
    grad_checkpointing: bool = False
    compile: bool = False
