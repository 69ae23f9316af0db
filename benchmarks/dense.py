"""Do adaptive patches pay for segmentation and detection? On photographs with pretrained weights, and from scratch.

    python benchmarks/dense.py --weights FILE [--task segmentation] [--contestants fixed crowded] [--tokens 64]
    python benchmarks/dense.py --task scratch [--contestants fixed moving] [--tokens 49]

Two recipes that one can start from: a decoder of segmentation_models_pytorch, and torchvision's FCOS, on the pyramid of
an APViT (`timm_apvit.pyramid`). Contestants differ in where their patches lie and in nothing else; each run has a file
of its own in `benchmarks/results`, and a finished one is not repeated. `--report` writes the table of what is there.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from dense_scores import segmented
from dense_tasks import TASKS, Task, Taught, batches, wanted_places
from environment import counted, write_report
from photographs import TEST_SEED, Places
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

import timm_apvit
from timm_apvit.finetuning.values import number
from timm_apvit.learning.parameter_groups import param_groups
from timm_apvit.learning.saliency import fit_saliency, saliency_loss
from timm_apvit.models.attention import calls_of
from timm_apvit.pictures.figures import load_drawing
from timm_apvit.pictures.plots import plot_patches

RESULTS = Path(__file__).parent / 'results'
NAME = 'apvit_small_patch14_dinov2'
CONTESTANTS = ('fixed', 'moving', 'crowded')
# Options that a result records, and what of its task.
RECORDED = (
    'images', 'batch', 'lr', 'localizer_lr_scale', 'background', 'saliency_weight', 'fit_epochs', 'model_kwargs',
)  # fmt: skip
OF_TASK = ('area_power', 'saliency_side')
STILL = {'transform': 'translation', 'max_shift': 0.0}


def arguments_of(task: Task, contestant: str, tokens: int) -> dict[str, Any]:
    """Arguments of ``create_model`` for a contestant with so many tokens."""
    if contestant == 'fixed':  # the ViT's own grid, on the image sampled with anti-aliasing
        return {'num_patches': tokens, **STILL}
    if contestant == 'moving':  # each patch by the localisation network, within its bounds
        return {'num_patches': tokens, 'max_shift': 2.0, 'max_zoom': 3.0}
    # They do not move further.
    localizer = {'name': 'saliency', 'side': task.saliency_side}
    return {'num_patches': tokens, 'localizer': localizer, 'max_shift': 0.0, 'max_zoom': 1.0}


def create(
    task: Task, contestant: str, tokens: int, weights: Path | None, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """The whole model, and the APViT in it."""
    overlay = {'file': str(weights), 'custom_load': False, 'num_classes': 0, 'input_size': (3, 518, 518)}
    name, start = ('test_apvit', task.arguments) if task.arguments else (NAME, {'pretrained_cfg_overlay': overlay})
    arguments = {
        **start, 'img_size': task.side, 'out_channels': task.channels,
        **arguments_of(task, contestant, tokens), **kwargs,
    }  # fmt: skip
    classes = len(task.names) + 1
    if task.score is segmented:
        channels = arguments.pop('in_chans', 3)  # which smp gives the encoder
        model = smp.Segformer(
            f'tu-pyramid.{name}', encoder_weights=True if weights else None, in_channels=channels, classes=classes,
            decoder_segmentation_channels=task.channels, **arguments,
        )  # fmt: skip
        return model, model.encoder.model.vit
    backbone = timm_apvit.pyramid(name, weights is not None, strides=(8, 16, 32), feature_cls='dict', **arguments)
    mean, std = ([value] * arguments.get('in_chans', 3) for value in (0.0, 1.0))  # images are normalised
    size = {'min_size': task.side, 'max_size': task.side, 'image_mean': mean, 'image_std': std}
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(backbone, classes, anchor_generator=anchors, **size), backbone.vit


def loss_of(task: Task, model: nn.Module, images: Tensor, places: list[Places], background: float) -> Tensor:
    """What is trained on; of a segmentation at a quarter of the resolution, which is that of the decoder.

    Most pixels are background: at a weight of one they say where things are, and for long not what they are.
    """
    if task.score is segmented:
        logits = model.segmentation_head[0](model.decoder(model.encoder(images)))  # type: ignore[operator, index]
        weights = torch.tensor([background, *[1.0] * len(task.names)])
        return F.cross_entropy(logits, torch.stack([each.mask[2::4, 2::4] for each in places]).long(), weights)
    targets = [{'boxes': each.boxes, 'labels': each.labels} for each in places]
    return sum(model(list(images), targets).values(), torch.zeros(()))


def multiply_adds(task: Task, model: nn.Module) -> float:
    """Of one image, decoder and all, in millions."""
    image = torch.zeros(1, (task.arguments or {}).get('in_chans', 3), task.side, task.side)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image if task.score is segmented else list(image))
    return counter.get_total_flops() / 2e6


def run(options: argparse.Namespace, contestant: str, tokens: int, seed: int) -> None:
    """Train one contestant, and test it on the way, unless its results are there."""
    parts = [options.task, contestant, str(tokens), str(seed), options.label]
    path = options.results / f'{"-".join(filter(None, parts))}.json'
    if path.exists():
        return
    torch.manual_seed(seed)
    task, batch = TASKS[options.task], options.batch
    model, vit = create(task, contestant, tokens, options.weights, **options.model_kwargs)
    cost = multiply_adds(task, model.eval())
    train = task.load('train', options.images // task.passes, seed + 1)
    calibration = task.load('train', 8 * batch, seed + 1)
    test = task.load('test', options.test_images, TEST_SEED)
    begin = time.perf_counter()
    if contestant == 'crowded':
        fit_saliency(vit, Taught(task, train, batch, seed), epochs=options.fit_epochs)
    groups = param_groups(vit, options.lr, 0.05, task.layer_decay, options.localizer_lr_scale)
    inside = set(vit.parameters())
    groups.append({'params': [p for p in model.parameters() if p not in inside], 'lr': 1e-3, 'weight_decay': 0.05})
    optimizer = torch.optim.AdamW(groups)
    updates = task.passes * -(-len(train) // batch)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group['lr'] for group in groups], total_steps=updates, pct_start=0.1, cycle_momentum=False
    )
    curve: list[dict[str, Any]] = []
    small, seconds = task.small * task.side**2, 0.0
    for update, (images, places) in enumerate(batches(train, task.passes, batch, seed), 1):
        with calls_of(vit.patch_embed) as seen:
            loss = loss_of(task, model.train(), images, places, options.background)
        if contestant == 'crowded':
            wanted = wanted_places(task, places)
            loss = loss + options.saliency_weight * saliency_loss(seen[-1][1].geometry, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if update % -(-updates // options.tests) == 0 or update == updates:
            seconds += time.perf_counter() - begin
            # Else a decoder's batch norm would be tested with statistics of the weights of some updates ago.
            update_bn(itertools.islice(batches(calibration, 1, batch, seed), 8), model)
            found = task.score(model.eval(), batches(test, 1, batch, 0), len(task.names) + 1, small)
            rounded = {name: round(value, 4) for name, value in found.items()}
            curve.append({'images': update * batch, 'seconds': round(seconds, 1), **rounded})
            sys.stdout.write(f'{path.stem} loss {loss.item():.3f} {curve[-1]}\n')
            sys.stdout.flush()
            begin = time.perf_counter()
    settings = {name: getattr(options, name) for name in RECORDED}
    settings.update({name: getattr(task, name) for name in OF_TASK})
    facts = {'task': options.task, 'contestant': contestant, 'tokens': tokens, 'seed': seed, 'label': options.label}
    write_report(path, options.threads, **facts, settings=settings, multiply_adds_millions=round(cost), curve=curve)
    if options.pictures and task.arguments is None:
        draw(vit, task.load('test', 4, TEST_SEED), path.with_suffix('.png'))


def draw(vit: nn.Module, samples: Any, picture: Path) -> None:
    """Draw where the patches lie on photographs, beside a fixed grid."""
    images = [(samples[index][0] * samples.std + samples.mean).clamp(0, 1) for index in range(len(samples))]
    figure = plot_patches(vit, images, panels=('image', 'fixed', 'adaptive', 'outlines'))
    picture.write_bytes(load_drawing().file_bytes(figure, dpi=60))


def report(results: Path, task: str) -> None:
    """Write the table of what has been run."""
    every = [json.loads(path.read_text()) for path in results.glob(f'{task}-*.json')]
    found = [each for each in every if each['task'] == task]
    names = [name for name in found[0]['curve'][-1] if name not in ('images', 'seconds')] if found else []
    lines = [
        f'| contestant | tokens | seed | million multiply-adds | {" | ".join(names)} |',
        '|---' * (4 + len(names)) + '|',
    ]
    for each in sorted(found, key=lambda run: (run['tokens'], run['contestant'], run['label'] or '', run['seed'])):
        name = ' '.join(filter(None, [each['contestant'], each['label']]))
        last = ' | '.join(f'{each["curve"][-1][metric]:.3f}' for metric in names)
        lines.append(f'| {name} | {each["tokens"]} | {each["seed"]} | {each["multiply_adds_millions"]:,} | {last} |')
    (results / f'{task}.md').write_text('\n'.join(lines) + '\n')
    sys.stdout.write('\n'.join(lines) + '\n')


def main() -> None:
    """Run what is asked for and has not been run, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--task', choices=TASKS, default='segmentation')
    add('--contestants', nargs='+', choices=CONTESTANTS, default=list(CONTESTANTS))
    add('--tokens', nargs='+', type=counted, default=[64])
    add('--seeds', nargs='+', type=number(int, 0), default=[0])
    add('--images', type=counted, default=4_000, help='images seen in a run, all different')
    add('--test-images', type=counted, default=300)
    add('--tests', type=counted, default=4, help='times that a run is tested')
    add('--batch', type=counted, help='images of an update (default: 16; from scratch 32)')
    add('--lr', type=float, help='peak learning rate of the ViT (default: 3e-4; from scratch 1e-3, as all after it)')
    add('--localizer-lr-scale', type=float, help='(default: 3; from scratch 1)')
    add('--background', type=float, default=0.2, help="weight of the background's pixels in a segmentation's loss")
    add('--saliency-weight', type=float, default=0.3, help='of the loss that teaches where things are')
    add('--fit-epochs', type=counted, default=2, help='over its images, for what says where they matter')
    add('--model-kwargs', type=json.loads, default={}, metavar='JSON', help='further arguments of create_model')
    add('--label', default='', help='of what differs, in the name of its results')
    add('--weights', type=Path, help="DINOv2's ViT-S/14")
    add('--pictures', action='store_true', help='draw where the patches of runs on photographs lie, beside the results')
    add('--threads', type=counted, default=1)
    add('--results', type=Path, default=RESULTS)
    add('--report', action='store_true', help='report only')
    options = parser.parse_args()
    task = TASKS[options.task]
    if not options.report and (options.weights is None) != (task.arguments is not None):
        parser.error(
            'expected --weights, the file of the pretrained ViT, with the tasks on photographs, and with no other'
        )
    for name in ('batch', 'lr', 'localizer_lr_scale'):
        if getattr(options, name) is None:
            setattr(options, name, getattr(task, name))
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for seed in options.seeds:
            for tokens in options.tokens:
                for contestant in options.contestants:
                    run(options, contestant, tokens, seed)
    report(options.results, options.task)


if __name__ == '__main__':
    main()
