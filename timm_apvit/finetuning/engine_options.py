"""Arguments of the training engine: what is learned how fast, from what teacher, and at what cost."""

import argparse

from timm_apvit.finetuning.parsing import number


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups of options that say how the engine trains."""
    _add_regularisation(parser)
    _add_rates(parser)
    _add_distillation(parser)
    _add_cost(parser)


def _add_regularisation(parser: argparse.ArgumentParser) -> None:
    at_least_0 = number(float, 0)
    add = parser.add_argument_group('mixing and averaging').add_argument
    add(
        '--mixup',
        type=at_least_0,
        metavar='ALPHA',
        help='blend pairs of images and of labels, 0.8 is usual (default: 0, none: pays on long schedules only)',
    )
    add(
        '--cutmix',
        type=at_least_0,
        metavar='ALPHA',
        help='paste a box of another image, 1.0 is usual; with --mixup half of the updates do either '
        '(default: 0, none: pays on long schedules only)',
    )
    add(
        '--mixup-prob',
        type=number(float, 0, 1, open_low=True),
        metavar='P',
        help='share of the updates that mix (default: 1, as in the recipes that use mixup)',
    )
    add(
        '--smoothing',
        type=number(float, 0, 1, open_high=True),
        metavar='S',
        help='label smoothing (default: 0, so that the loss is that of the labels; 0.1 is usual with mixup)',
    )
    add(
        '--ema',
        type=number(float, 0, 1, open_low=True, open_high=True),
        metavar='DECAY',
        help='evaluate and export a moving average of the weights, such as 0.9998; it warms up, for short runs '
        '(default: none: a cosine schedule ends in an average of its own)',
    )


def _add_rates(parser: argparse.ArgumentParser) -> None:
    positive, counted_from_0 = number(float, 0, open_low=True), number(int, 0)
    add = parser.add_argument_group('what learns, and how fast').add_argument
    add(
        '--localizer-lr-scale',
        type=positive,
        metavar='X',
        help='factor on the rate of what a ViT does not have (default: 1: rates of 0.3 to 1 came out alike)',
    )
    add(
        '--backbone-lr-scale',
        type=positive,
        metavar='X',
        help='factor on the rate of the ViT without its classifier, besides --layer-decay (default: 1)',
    )
    add(
        '--glance-epochs',
        type=counted_from_0,
        metavar='E',
        help='epochs over the glances of --localizer glance, kept from one pass over the images, in which what reads '
        'them is fitted first (default: 10; from scratch 0: new blocks see nothing)',
    )
    add(
        '--freeze-backbone-epochs',
        type=counted_from_0,
        metavar='E',
        help='first epochs in which only what a ViT does not have and the classifier learn (default: 0)',
    )
    add(
        '--freeze-localizer-epochs',
        type=counted_from_0,
        metavar='E',
        help='first epochs in which what a ViT does not have stays as it is (default: 0)',
    )
    add(
        '--jitter',
        type=number(float, 0),
        metavar='X',
        help="noise on the patches' centres while training, in half-extents (default: the model's own, 0 if it says "
        'none)',
    )
    add(
        '--jitter-epochs',
        type=number(int, 1),
        metavar='E',
        help='epochs over which --jitter falls to 0 (default: it stays, so that it regularises to the end)',
    )


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    at_least_0 = number(float, 0)
    add = parser.add_argument_group('distillation').add_argument
    add(
        '--teacher',
        metavar='NAME|FILE|self',
        help='also learn from this model: a name known to timm, local-dir:..., a checkpoint of the same ViT or APViT, '
        'or self, the starting weights on their full grid (default: none)',
    )
    add(
        '--distill-weight',
        type=number(float, 0, 1),
        metavar='W',
        help="share of the teacher's logits in the loss, the labels have the rest (default: 0.5; 0 if the teacher's "
        'classifier was not trained on these classes)',
    )
    add(
        '--distill-temperature',
        type=number(float, 0, open_low=True),
        metavar='T',
        help='of both logits (default: 1: the distribution that the teacher predicts)',
    )
    add(
        '--token-weight',
        type=at_least_0,
        metavar='W',
        help="weight of 1 - cosine between the student's and the teacher's pooled features (default: 0; 1 if the "
        "teacher's logits cannot be used)",
    )
    add(
        '--attention-weight',
        type=at_least_0,
        metavar='W',
        help="weight of drawing the patches to where the teacher's last block attends (default: 0: try 0.1)",
    )


def _add_cost(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('speed and memory').add_argument
    add(
        '--amp',
        choices=('bfloat16', 'float16'),
        help='compute in 16 bits where it is safe (default: none, so that results agree between machines)',
    )
    add(
        '--grad-accum',
        type=number(int, 1),
        metavar='N',
        help='compute each batch in N pieces, in less memory, with the same result but for random noise (default: 1, '
        'which is fastest)',
    )
    add(
        '--grad-checkpointing',
        action=argparse.BooleanOptionalAction,
        help='compute activations twice rather than keep them: less memory, one more forward pass (default: no)',
    )
    add(
        '--compile',
        action=argparse.BooleanOptionalAction,
        help="compile the model's blocks by torch.compile, one for all (default: no: it takes a minute at first)",
    )
    add(
        '--timeout',
        type=number(float, 0, open_low=True),
        metavar='MINUTES',
        help='give up when another process of a distributed training has not answered for so long (default: 10: '
        'longer than any step, shorter than a queue)',
    )
