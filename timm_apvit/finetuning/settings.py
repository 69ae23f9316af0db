"""Settings of the fine-tuning command: one dataclass is its options, their help and the check of them and of files."""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from timm_apvit.finetuning.values import (
    Budget,
    boolean,
    mapping,
    number,
    one_of,
    parse_num_patches,
    parse_size,
    text,
)

CONFIG_FILE = 'config.yaml'
SELF = 'self'  # the teacher that is the model as it starts
COUNT, FROM_0 = number(int, 1), number(int, 0)
POSITIVE, AT_LEAST_0, SHARE = number(float, 0, open_low=True), number(float, 0), number(float, 0, 1)
# What --resume takes anew each time: how fast a run computes and where it goes, not what it is.
RUNTIME = 'runtime'
# What a run keeps until --resume changes it: whether it fits into memory, how long it is, what it tells and keeps.
CHANGEABLE = 'changeable'

INTERPOLATIONS = ('random', 'bilinear', 'bicubic', 'nearest', 'lanczos')

# Of earlier versions, and what stands in their place.
REMOVED = {
    'max_focus': '--localizer glance finds the window by itself',
    'guide_weight': 'with --localizer glance the labels teach where to look',
    'whole_share': '--model-kwargs whole_share=0.1 sets it, with --localizer glance',
    'tensorboard': '--log-with tensorboard writes the metrics for TensorBoard',
}
DATA_HELP = (
    'folder with train/ and val/ (or validation/, test/), each with one folder of images per class, or with train.csv '
    'and val.csv, which list paths of images and labels; or the name of a timm dataset: hfds/NAME, hfids/NAME, wds/, '
    'torch/NAME, tfds/NAME (a folder of such a name: ./wds); default: real digits among clutter, without a network'
)
MODEL, TRAINING, RUNNING, MIXING = 'model', 'training', 'running', 'mixing and averaging'
RATES, DISTILLATION, SPEED = 'what learns, and how fast', 'distillation', 'speed and memory'
DATASETS, IMAGES, AUGMENTATION = 'data: for timm datasets', 'images', 'augmentation: of DATA'


def option(group: str, kind: Any, about: str, default: Any = None, resume: str | None = None, **given: Any) -> Any:
    """A field of `Settings` that is an option: its group, parser, help, default, what --resume may do, and metavar."""
    choices = {'choices': kind.choices} if hasattr(kind, 'choices') else {}
    given = {'help': about, **choices, **given}
    metadata = {'group': group, 'kind': kind, 'resume': resume, 'argparse': given}
    return field(metadata=metadata, **({'default_factory': dict} if kind is mapping else {'default': default}))


@dataclass(frozen=True)
class Settings:
    """Settings of a run; None stands for a default that depends on others, or for the model's or timm's own."""

    # fmt: off
    data: str | None = option('', text, DATA_HELP)

    model: str | None = option(MODEL, text,
        'apvit_small, ... (default: apvit_small; without DATA test_apvit)', metavar='NAME')
    pretrained: bool = option(MODEL, boolean, 'start from the pretrained weights of the ViT (default: no)', False)
    checkpoint: str | None = option(MODEL, text,
        'start from the weights in a file, of a ViT or an APViT (default: none)', metavar='FILE')
    num_patches: tuple[Budget, ...] | None = option(MODEL, parse_num_patches,
        "how many, or GHxGW (default: the model's own); several, such as 16,49,196: one of them at random in each "
        'update, for one model that serves them all', metavar='N[,N...]')
    transform: str | None = option(MODEL, text,
        "what a patch may do: translation, scale, ... (default: the model's own)", metavar='NAME')
    localizer: str | None = option(MODEL, text,
        'what says where patches lie: cnn, glance, ... (default: what a saved model has; with the weights of a ViT '
        'glance, else cnn)', metavar='NAME')
    img_size: Any = option(MODEL, parse_size,
        "side of the images, or HxW (default: the model's own)", metavar='PIXELS')
    model_kwargs: dict[str, Any] = option(MODEL, mapping,
        'further arguments of the model, such as max_shift=2.0 drop_path_rate=0.1 (default: none)',
        metavar='KEY=VALUE')
    twin: bool | None = option(MODEL, boolean,
        'also train the same ViT with as many patches on a fixed grid, on the image made smaller, and compare '
        '(default: without DATA)')

    epochs: int | None = option(TRAINING, COUNT,
        'with --resume a larger number lengthens a run (default: 10; without DATA 5, which take minutes on a CPU)',
        resume=CHANGEABLE)
    batch_size: int | None = option(TRAINING, COUNT,
        'images of an update, over all processes and --grad-accum (default: 64, small enough for most machines; '
        'without DATA 32, from which a ViT this small learns sooner)')
    opt: str = option(TRAINING, text,
        "any of timm's optimisers (default: adamw, usual for ViTs)", 'adamw', metavar='NAME')
    lr: float | None = option(TRAINING, POSITIVE,
        'peak learning rate (default: 1e-3; from given weights 2e-4, which keeps what they know)')
    sched: str = option(TRAINING, one_of('cosine', 'poly', 'tanh'),
        "one of timm's schedules: cosine, poly or tanh (default: cosine)", 'cosine', metavar='NAME')
    layer_decay: float | None = option(TRAINING, number(float, 0, 1, open_low=True),
        'factor of the learning rate from a block to the one below (default: 1; from given weights 0.75: what lies '
        'deeper is more general)')
    weight_decay: float = option(TRAINING, AT_LEAST_0, '(default: 0.05, usual for ViTs)', 0.05)
    clip_grad: float = option(TRAINING, AT_LEAST_0,
        'largest norm of the gradient; 0: any (default: 1, usual for ViTs)', 1.0)
    warmup: float | None = option(TRAINING, AT_LEAST_0,
        'epochs of rising learning rate (default: a tenth of all; from scratch a fifth: patches may fly to their bounds'
        ' before the ViT can read them)', metavar='EPOCHS')
    monitor: str | None = option(TRAINING, one_of('test_top1', 'test_map', 'test_loss'),
        'what the best epoch is best in: test_top1, test_map or test_loss (default: the first; with --multi-label the '
        'mean average precision)')
    patience: int | None = option(TRAINING, COUNT,
        'end the run after so many epochs without a better one (default: never)', resume=CHANGEABLE, metavar='EPOCHS')
    class_weights: str | None = option(TRAINING, one_of('balanced', 'equal'),
        'balanced: weigh the loss of a class by the inverse of its share of the images of a folder (default: equal)')
    balanced_sampling: bool = option(TRAINING, boolean,
        'draw the images of a folder so that all classes come equally often (default: no)', False)
    seed: int = option(TRAINING, number(int, 0, 2**63 - 1),
        'of all that is random (default: 0, so that a run can be repeated)', 0)
    samples: int | None = option(TRAINING, COUNT, 'embedded images per epoch (default: 8000, 17 s on a CPU)')
    test_samples: int | None = option(TRAINING, COUNT,
        'embedded test images (default: 1000: a standard error of 1.5 points)')

    output: str | None = option(RUNNING, text,
        'a new folder for checkpoints, metrics and picture (default: runs/MODEL-TIME)', resume=RUNTIME, metavar='DIR')
    resume: str | None = option(RUNNING, text,
        'continue the run in this folder, with its own options', resume=RUNTIME, metavar='DIR')
    log_with: str | None = option(RUNNING, text,
        'also log the metrics by this tracker of accelerate: tensorboard, wandb, mlflow, ... (default: none: '
        'metrics.csv and metrics.jsonl have them all)', resume=CHANGEABLE, metavar='NAME')
    log_every: int = option(RUNNING, COUNT,
        'where there is no terminal, a line every so many updates (default: 100)',
        100, resume=RUNTIME, metavar='UPDATES')
    save_minutes: float | None = option(RUNNING, POSITIVE,
        'also save a checkpoint whenever so many minutes have passed (default: after each epoch only)',
        resume=RUNTIME, metavar='MINUTES')
    snapshots: bool = option(RUNNING, boolean,
        'keep the model of every epoch, from which show --animate draws how the patches came to lie (default: no: they'
        ' take the space of a model each)', False, resume=CHANGEABLE)
    push_to_hub: str | None = option(RUNNING, text,
        'push the best model to this repository of the Hugging Face Hub after the run, with a card that shows the '
        'picture; also with --resume (default: not; timm-apvit push has more options)',
        resume=RUNTIME, metavar='REPO_ID')
    private: bool = option(RUNNING, boolean,
        'make that repository private, if it is new (default: public)', False, resume=RUNTIME)
    push_picture: bool = option(RUNNING, boolean,
        'push the picture too, which shows 8 test images (default: yes)', True, resume=RUNTIME)
    workers: int | None = option(RUNNING, FROM_0,
        'processes that load data (default: 0; with DATA up to 8, to keep a GPU busy)', resume=RUNTIME)
    threads: int | None = option(RUNNING, COUNT, "of computation on the CPU (default: PyTorch's own)", resume=RUNTIME)
    device: str | None = option(RUNNING, text,
        'cpu, cuda, cuda:1, ... (default: cuda if there is one)', resume=RUNTIME)
    timeout: float = option(RUNNING, POSITIVE,
        'give up when another process of a distributed training has not answered for so long (default: 10: longer than'
        ' any step, shorter than a queue)', 10.0, resume=RUNTIME, metavar='MINUTES')

    mixup: float = option(MIXING, AT_LEAST_0,
        'blend pairs of images and of labels, 0.8 is usual (default: 0, none: pays on long schedules only)',
        0.0, metavar='ALPHA')
    cutmix: float = option(MIXING, AT_LEAST_0,
        'paste a box of another image, 1.0 is usual; with --mixup half of the updates do either (default: 0, none: '
        'pays on long schedules only)', 0.0, metavar='ALPHA')
    mixup_prob: float = option(MIXING, number(float, 0, 1, open_low=True),
        'share of the updates that mix (default: 1, as in the recipes that use mixup)', 1.0, metavar='P')
    smoothing: float = option(MIXING, number(float, 0, 1, open_high=True),
        'label smoothing (default: 0, so that the loss is that of the labels; 0.1 is usual with mixup)',
        0.0, metavar='S')
    ema: float | None = option(MIXING, number(float, 0, 1, open_low=True, open_high=True),
        'evaluate and export a moving average of the weights, such as 0.9998; it warms up, for short runs (default: '
        'none: a cosine schedule ends in an average of its own)', metavar='DECAY')

    localizer_lr_scale: float = option(RATES, POSITIVE,
        'factor on the rate of the adaptive layers (default: 1: rates of 0.3 to 1 came out alike)', 1.0, metavar='X')
    backbone_lr_scale: float = option(RATES, POSITIVE,
        'factor on the rate of the ViT without its classifier, besides --layer-decay (default: 1)', 1.0, metavar='X')
    glance_epochs: int | None = option(RATES, FROM_0,
        'epochs over the glances of --localizer glance, kept from one pass over the images, in which what reads them '
        'is fitted first (default: 10; from scratch 0: new blocks see nothing)', metavar='E')
    freeze_backbone_epochs: int = option(RATES, FROM_0,
        'first epochs in which only the adaptive layers and the classifier learn (default: 0)', 0, metavar='E')
    freeze_localizer_epochs: int = option(RATES, FROM_0,
        'first epochs in which the adaptive layers stay as they are (default: 0)', 0, metavar='E')
    jitter: float | None = option(RATES, AT_LEAST_0,
        "noise on the patches' centres while training, in half-extents (default: the model's own, 0 if it says none)",
        metavar='X')
    jitter_epochs: int | None = option(RATES, COUNT,
        'epochs over which --jitter falls to 0 (default: it stays, so that it regularises to the end)', metavar='E')

    teacher: str | None = option(DISTILLATION, text,
        'also learn from this model: a name known to timm, the folder of a run or of a saved model, a checkpoint of '
        'the same ViT or APViT, or self, the starting weights on their full grid (default: none)',
        metavar='NAME|DIR|FILE|self')
    distill_weight: float | None = option(DISTILLATION, SHARE,
        "share of the teacher's logits in the loss, the labels have the rest (default: 0.5; 0 if the teacher's "
        'classifier was not trained on these classes)', metavar='W')
    distill_temperature: float = option(DISTILLATION, POSITIVE,
        'of both logits (default: 1: the distribution that the teacher predicts)', 1.0, metavar='T')
    token_weight: float | None = option(DISTILLATION, AT_LEAST_0,
        "weight of 1 - cosine between the student's and the teacher's pooled features (default: 0; 1 if the teacher's "
        'logits cannot be used)', metavar='W')
    attention_weight: float = option(DISTILLATION, AT_LEAST_0,
        "weight of drawing the patches to where the teacher's last block attends (default: 0: try 0.1)",
        0.0, metavar='W')

    amp: str | None = option(SPEED, one_of('bfloat16', 'float16'),
        'compute in 16 bits where it is safe: bfloat16 or float16 (default: none, so that results agree between '
        'machines)')
    grad_accum: int = option(SPEED, COUNT,
        'compute each batch in N micro-batches, in less memory, with the same result but for random noise (default: 1,'
        ' which is fastest)', 1, resume=CHANGEABLE, metavar='N')
    grad_checkpointing: bool = option(SPEED, boolean,
        'compute activations twice rather than keep them: less memory, one more forward pass (default: no)',
        False, resume=CHANGEABLE)
    compile: bool = option(SPEED, boolean,
        "compile the model's blocks by torch.compile, one for all (default: no: it takes a minute at first)",
        False, resume=CHANGEABLE)

    data_dir: str | None = option(DATASETS, text,
        'folder of the files, or of the cache (default: none, which hfds/ and hfids/ take for their own cache)',
        metavar='DIR')
    train_split: str = option(DATASETS, text,
        'of training images; for wds/ a pattern of shards and their number of images will do: '
        "'train-{0000..0063}.tar|81920' (default: train, which most datasets have)", 'train', metavar='NAME')
    val_split: str = option(DATASETS, text,
        "of test images (default: validation, timm's own default)", 'validation', metavar='NAME')
    train_samples: int | None = option(DATASETS, COUNT,
        'training images of a stream, which make an epoch (default: as the data say; some do not)', metavar='N')
    val_samples: int | None = option(DATASETS, COUNT,
        'test images of a stream that does not say how many (default: as it says; all are read in any case)',
        metavar='N')
    num_classes: int | None = option(DATASETS, COUNT,
        'number of classes (default: as the data say; wds/ does not)', metavar='N')
    class_map: str | None = option(DATASETS, text,
        "names of the classes, one a line, in order of their numbers; for folders too (default: the data's own)",
        metavar='FILE')
    multi_label: bool = option(DATASETS, boolean,
        'an image has any number of labels, which train.csv and val.csv of DATA list with | between them (default: one'
        ' label)', False)
    image_key: str | None = option(DATASETS, text,
        "field of the image (default: timm's: image; for wds/ jpg;png;webp)", metavar='NAME')
    target_key: str | None = option(DATASETS, text,
        "field of the class (default: timm's: label; for wds/ the .cls file)", metavar='NAME')
    download: bool = option(DATASETS, boolean,
        'fetch torch/, hfids/ and tfds/ first (default: not, to touch no disk)', False)

    crop_pct: float | None = option(IMAGES, number(float, 0, 1, open_low=True),
        "side of the central crop of a test image (default: the model's own, which its accuracy was measured at)",
        metavar='X')
    mean: list[float] | None = option(IMAGES, number(float, -1000000.0),
        "of each channel, subtracted from images of [0, 1] (default: that of the weights' own ViT)",
        nargs='+', metavar='X')
    std: list[float] | None = option(IMAGES, POSITIVE,
        'of each channel, divided by then (default: likewise)', nargs='+', metavar='X')

    no_aug: bool = option(AUGMENTATION, boolean,
        'resize and crop the centre only (default: not, as few images overfit)', False)
    aa: str | None = option(AUGMENTATION, text,
        "timm's AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1, in place of the colour jitter (default: "
        'none, which suits short fine-tuning)', metavar='POLICY')
    reprob: float | None = option(AUGMENTATION, SHARE,
        'of erasing a random box (default: 0; long trainings profit from it)', metavar='P')
    color_jitter: float | None = option(AUGMENTATION, AT_LEAST_0,
        "greatest change of brightness, contrast and saturation (default: 0.4, timm's); 0: none", metavar='X')
    hflip: float | None = option(AUGMENTATION, SHARE,
        'of mirroring (default: 0.5; 0 where left and right differ: text)', metavar='P')
    vflip: float | None = option(AUGMENTATION, SHARE,
        'of turning upside down (default: 0; photographs have an up)', metavar='P')
    scale: list[float] | None = option(AUGMENTATION, POSITIVE,
        "share of the image's area that a random crop takes (default: 0.08 1, as ImageNet is trained)",
        nargs=2, metavar=('MIN', 'MAX'))
    ratio: list[float] | None = option(AUGMENTATION, POSITIVE,
        'width to height of a random crop (default: 0.75 1.3333, as ImageNet is trained)',
        nargs=2, metavar=('MIN', 'MAX'))
    train_interpolation: str | None = option(AUGMENTATION, one_of(*INTERPOLATIONS),
        "of training images: bilinear, bicubic, ... (default: the model's own, as in the test)", metavar='NAME')
    # fmt: on

    @property
    def images_of_update(self) -> int:
        """``batch_size``, or its default with DATA."""
        return self.batch_size or 64


FIELDS: dict[str, Field[Any]] = {each.name: each for each in fields(Settings)}
SAVED = [name for name, each in FIELDS.items() if each.metadata['resume'] != RUNTIME]
# Those that say what is read and how, without the augmentation; a test takes them too.
OF_DATA = [name for name, each in FIELDS.items() if each.metadata['group'] in ('', DATASETS, IMAGES)]
OF_AUGMENTATION = [name for name, each in FIELDS.items() if each.metadata['group'] == AUGMENTATION]
