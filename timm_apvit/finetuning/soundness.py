"""Options that contradict each other, and batches that cannot be divided."""

from timm_apvit.finetuning.distributed import is_main
from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.parsing import flag
from timm_apvit.finetuning.schedule import Schedule
from timm_apvit.finetuning.sharing import Share
from timm_apvit.hub.access import check_access

TEACHING = ('distill_weight', 'distill_temperature', 'token_weight', 'attention_weight')


def check_options(options: Options) -> None:
    """Raise ValueError if options that were given exclude each other."""
    if options.pretrained and options.checkpoint is not None:
        raise ValueError('expected --pretrained or --checkpoint, got both: each says where the weights come from')
    for name in ('samples', 'test_samples'):
        if options.data is not None and getattr(options, name) is not None:
            raise ValueError(
                f'expected {flag(name)} without DATA only, whose images count themselves, got {flag(name)} with DATA'
            )
    for name in ('num_patches', 'transform', 'img_size', 'jitter', 'localizer'):
        if getattr(options, name) is not None and name in options.model_kwargs:
            raise ValueError(f'expected {flag(name)} or {name} among --model-kwargs, got both')
    if options.glance_epochs and options.localizer not in (None, 'glance'):
        raise ValueError(f'expected --localizer glance with --glance-epochs, got {options.localizer}')
    usual = Options()
    lessons = [name for name in TEACHING if getattr(options, name) != getattr(usual, name)]
    if options.teacher is None and lessons:
        raise ValueError(f'expected --teacher with {flag(lessons[0])}, got none')
    if options.jitter_epochs is not None and not options.jitter:
        raise ValueError('expected a --jitter above 0 for --jitter-epochs to lower, got none')
    if options.mixup_prob != usual.mixup_prob and not (options.mixup or options.cutmix):
        raise ValueError('expected --mixup or --cutmix with --mixup-prob, got neither')


def check_destination(options: Options) -> None:
    """Ask the Hub, without writing, whether the model can be pushed to where the options say.

    Raises:
        ValueError: a malformed name, or an option that needs one.
        OSError: the Hub does not answer, or does not let this token write there.
    """
    if options.push_to_hub is not None and is_main():
        check_access(options.push_to_hub)
    if options.private and options.push_to_hub is None:
        raise ValueError('expected --push-to-hub with --private, got none')
    if not options.push_picture and options.push_to_hub is None:
        raise ValueError('expected --push-to-hub with --no-push-picture, got none')


def check_epochs(schedule: Schedule) -> None:
    """Raise ValueError if something is to last longer than the training."""
    if schedule.warmup >= schedule.epochs:
        raise ValueError(f'expected --warmup below --epochs, got {schedule.warmup:g} of {schedule.epochs}')
    for name in ('freeze_backbone_epochs', 'freeze_localizer_epochs', 'jitter_epochs'):
        value = getattr(schedule, name)
        if value is not None and value > schedule.epochs:
            raise ValueError(f'expected {flag(name)} of at most --epochs, got {value} of {schedule.epochs}')


def check_batches(schedule: Schedule, samples: int, share: Share) -> None:
    """Raise ValueError unless batches divide evenly among processes and pieces, and into pairs if they are mixed."""
    batch = min(schedule.batch_size, samples)
    mixes = schedule.mixup > 0 or schedule.cutmix > 0
    unit = share.parts * (2 if mixes else 1)
    if batch % unit:
        pairs = ', in pairs for --mixup and --cutmix' if mixes else ''
        few = f' (there are {samples} training images)' if samples < schedule.batch_size else ''
        raise ValueError(
            f'expected a --batch-size that divides by {unit}: {share.world} processes x {share.pieces} of '
            f'--grad-accum{pairs}, got {batch}{few}'
        )
