"""Options of the fine-tuning command: their names and defaults."""

import argparse
from dataclasses import dataclass, field
from typing import Any

from timm_apvit.finetuning.data_options import (
    DATA_HELP,
    DataOptions,
    add_augmentation_arguments,
    add_data_arguments,
)
from timm_apvit.finetuning.distributed import DEFAULT_TIMEOUT
from timm_apvit.finetuning.engine_options import add_engine_arguments
from timm_apvit.finetuning.parsing import (
    Budget,
    ModelKwargs,
    Removed,
    flag,
    number,
    parse_model_kwarg,
    parse_num_patches,
)

# What trains without any argument: a model small enough for a CPU on images that need no network.
EMBEDDED_MODEL = 'test_apvit'
EMBEDDED_IMG_SIZE = 112
EMBEDDED_SAMPLES, EMBEDDED_TEST_SAMPLES = 8_000, 1_000
EMBEDDED_NUM_PATCHES: tuple[Budget, ...] = ((4, 4),)
# Patches that only move read 0.88, 0.93 and 0.91 of the digits after 6 epochs (three seeds), those that also change in
# size 0.66 (the first of these).
EMBEDDED_TRANSFORM = 'translation'
EMBEDDED_MODEL_KWARGS: dict[str, Any] = {
    'embed_dim': 128,
    'depth': 4,
    'num_heads': 4,
    'max_shift': 1.5,
    # Without these three a ViT this small takes several times as long to learn anything at all from scratch.
    'class_token': False,
    'global_pool': 'avg',
    'weight_init': 'jax',
}
# These change where and how fast a run computes, and where it goes, not what: --resume takes them anew.
RUNTIME_OPTIONS = frozenset(
    {'output', 'resume', 'workers', 'device', 'threads', 'timeout', 'push_to_hub', 'private', 'push_picture'}
)
# These too, but a run keeps them until --resume changes them: whether it fits into memory, what it tells and keeps.
CHANGEABLE_OPTIONS = frozenset({'grad_accum', 'grad_checkpointing', 'compile', 'tensorboard', 'snapshots'})

# Of earlier versions, and what stands in their place.
REMOVED_OPTIONS = {
    'max_focus': '--localizer glance finds the window by itself',
    'guide_weight': 'with --localizer glance the labels teach where to look',
    'whole_share': '--model-kwargs whole_share=0.1 sets it, with --localizer glance',
}


@dataclass(frozen=True)
class Options(DataOptions):
    """Options of the command; None stands for a default that depends on others (`with_defaults`)."""

    model: str | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    num_patches: tuple[Budget, ...] | None = None
    transform: str | None = None
    localizer: str | None = None
    img_size: int | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    twin: bool | None = None
    epochs: int | None = None
    batch_size: int = 64
    lr: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.05
    warmup: float | None = None
    samples: int | None = None
    test_samples: int | None = None
    seed: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    smoothing: float = 0.0
    ema: float | None = None
    localizer_lr_scale: float = 1.0
    backbone_lr_scale: float = 1.0
    glance_epochs: int | None = None
    freeze_backbone_epochs: int = 0
    freeze_localizer_epochs: int = 0
    jitter: float | None = None
    jitter_epochs: int | None = None
    teacher: str | None = None
    distill_weight: float | None = None
    distill_temperature: float = 1.0
    token_weight: float | None = None
    attention_weight: float = 0.0
    amp: str | None = None
    grad_accum: int = 1
    grad_checkpointing: bool = False
    compile: bool = False
    timeout: float = DEFAULT_TIMEOUT
    workers: int | None = None
    threads: int | None = None
    device: str | None = None
    tensorboard: bool = False
    snapshots: bool = False
    push_to_hub: str | None = None
    private: bool = False
    push_picture: bool = True
    output: str | None = None
    resume: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    counted, positive, rate = number(int, 1), number(float, 0, open_low=True), number(float, 0)
    parser.add_argument(
        'data',
        nargs='?',
        metavar='DATA',
        help=DATA_HELP,
    )

    add = parser.add_argument_group('model').add_argument
    add('--model', metavar='NAME', help=f'apvit_small, ... (default: apvit_small; without DATA {EMBEDDED_MODEL})')
    add('--pretrained', action='store_true', help='start from the pretrained weights of the ViT')
    add('--checkpoint', metavar='FILE', help='start from the weights in a file, of a ViT or an APViT')
    add(
        '--num-patches',
        type=parse_num_patches,
        metavar='N[,N...]',
        help="how many, or GHxGW (default: the model's own); several, such as 16,49,196: one of them at random in each "
        'update, for one model that serves them all',
    )
    add('--transform', metavar='NAME', help="what a patch may do: translation, scale, ... (default: the model's own)")
    add(
        '--localizer',
        metavar='NAME',
        help='what says where patches lie: cnn, glance, ... (default: what a saved model has; with the weights of a '
        'ViT glance, else cnn)',
    )
    add('--img-size', type=counted, metavar='PIXELS', help="side of the images (default: the model's own)")
    add(
        '--model-kwargs',
        type=parse_model_kwarg,
        action=ModelKwargs,
        nargs='+',
        metavar='KEY=VALUE',
        help='further arguments of the model, such as max_shift=2.0 drop_path_rate=0.1',
    )
    add(
        '--twin',
        action=argparse.BooleanOptionalAction,
        help='also train the same ViT with as many patches on a fixed grid, on the image made smaller, and compare '
        '(default: without DATA)',
    )

    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=counted, help='(default: 10; without DATA 6, which take minutes on a CPU)')
    add(
        '--batch-size',
        type=counted,
        help='images of an update, over all processes and --grad-accum (default: 64, small enough for most machines)',
    )
    add(
        '--lr',
        type=positive,
        help='peak learning rate (default: 1e-3; from given weights 2e-4, which keeps what they know)',
    )
    add(
        '--layer-decay',
        type=number(float, 0, 1, open_low=True),
        help='factor of the learning rate from a block to the one below (default: 1; from given weights 0.75: '
        'what lies deeper is more general)',
    )
    add('--weight-decay', type=rate, help='of AdamW (default: 0.05, usual for ViTs)')
    add(
        '--warmup',
        type=rate,
        metavar='EPOCHS',
        help='epochs of rising learning rate (default: a tenth of all: fresh layers disturb less)',
    )
    add('--seed', type=number(int, 0), help='of all that is random (default: 0, so that a run can be repeated)')
    add('--samples', type=counted, help=f'embedded images per epoch (default: {EMBEDDED_SAMPLES}, a minute on a CPU)')
    add(
        '--test-samples',
        type=counted,
        help=f'embedded test images (default: {EMBEDDED_TEST_SAMPLES}: a standard error of 1.5 points)',
    )

    add = parser.add_argument_group('running').add_argument
    add('--output', metavar='DIR', help='a new folder for checkpoints, metrics and picture (default: runs/MODEL-TIME)')
    add(
        '--config',
        metavar='FILE',
        help='YAML or JSON with options by their names, such as batch_size: 64; those given here win; each run writes '
        'a config.yaml that repeats it (default: none)',
    )
    add('--resume', metavar='DIR', help='continue the interrupted run in this folder, with its own options')
    add(
        '--tensorboard',
        action=argparse.BooleanOptionalAction,
        help='write the metrics for TensorBoard too (default: no: metrics.csv and metrics.jsonl have them all)',
    )
    add(
        '--snapshots',
        action=argparse.BooleanOptionalAction,
        help='keep the model of every epoch, from which show --animate draws how the patches came to lie (default: no: '
        'they take the space of a model each)',
    )
    add(
        '--push-to-hub',
        metavar='REPO_ID',
        help='push the best model to this repository of the Hugging Face Hub after the run, with a card that shows the '
        'picture; also with --resume (default: not; python -m timm_apvit push has more options)',
    )
    add('--private', action='store_true', help='make that repository private, if it is new (default: public)')
    add(
        '--push-picture',
        action=argparse.BooleanOptionalAction,
        help='push the picture too, which shows 8 test images (default: yes)',
    )
    add(
        '--workers',
        type=number(int, 0),
        help='processes that load data (default: 0; with DATA up to 8, to keep a GPU busy)',
    )
    add('--threads', type=counted, help="of computation on the CPU (default: PyTorch's own)")
    add('--device', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)')

    for name, instead in REMOVED_OPTIONS.items():
        parser.add_argument(flag(name), nargs='?', action=Removed, const=instead, help=argparse.SUPPRESS)
    add_engine_arguments(parser)
    add_data_arguments(parser, training=True)
    add_augmentation_arguments(parser)
