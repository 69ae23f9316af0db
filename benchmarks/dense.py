"""Do adaptive patches pay for segmentation and detection? On photographs with several things, with pretrained weights.

    python benchmarks/dense.py --weights FILE [--task segmentation] [--contestants fixed crowded] [--tokens 64]

Two recipes that one can start from: a decoder of segmentation_models_pytorch, and torchvision's FCOS, on the pyramid of
an APViT (`timm_apvit.pyramid`). Contestants differ in where their patches lie and in nothing else; each run has a file
of its own in `benchmarks/results`, and a finished one is not repeated. `--report` writes the table of what is there.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from environment import counted, write_report
from photographs import CATEGORIES, TEST_SEED, Places, Populated, Scene
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

import timm_apvit
from timm_apvit.finetuning.values import number
from timm_apvit.learning.parameter_groups import param_groups
from timm_apvit.learning.saliency import fit_saliency, saliency_loss
from timm_apvit.models.attention import calls_of

RESULTS = Path(__file__).parent / 'results'
SCENE = Scene(areas=(0.005, 0.1))
NAME, CLASSES = 'apvit_small_patch14_dinov2', len(CATEGORIES) + 1
CHANNELS = {'segmentation': 48, 'detection': 64}
# Of a thing's box, in pixels: those below are small.
SMALL = 0.02 * SCENE.side**2
# In results and in this order in the table; metrics of a task, the first of which is what it is about.
CONTESTANTS = ('fixed', 'moving', 'crowded')
METRICS = {
    'segmentation': ('miou', 'iou_foreground', 'recall_small'),
    'detection': ('ap50', 'ap50_small', 'ap50_large', 'ap'),
}
# Share of what matters that is spread evenly.
EVEN = 0.05
# Options that a result records.
RECORDED = ('images', 'batch', 'lr', 'localizer_lr_scale', 'saliency_weight', 'model_kwargs')
STILL = {'transform': 'translation', 'max_shift': 0.0}


def arguments_of(contestant: str, tokens: int) -> dict[str, Any]:
    """Arguments of ``create_model`` for a contestant with so many tokens."""
    if contestant == 'fixed':  # the ViT's own grid, on the image sampled with anti-aliasing
        return {'num_patches': tokens, **STILL}
    if contestant == 'moving':  # each patch by the localisation network, within its bounds
        return {'num_patches': tokens, 'max_shift': 2.0, 'max_zoom': 3.0}
    # A glance crowds them, and the localisation network does not move them further.
    glance = {'name': 'glance', 'grid': 10, 'blocks': 3, 'crowd': 0.7}
    return {'num_patches': tokens, 'localizer': glance, 'max_shift': 0.0, 'max_zoom': 1.0}


def create(task: str, contestant: str, tokens: int, weights: Path, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The whole model, and the APViT in it."""
    overlay = {'file': str(weights), 'custom_load': False, 'num_classes': 0, 'input_size': (3, 518, 518)}
    arguments = {
        'pretrained_cfg_overlay': overlay, 'img_size': SCENE.side, 'out_channels': CHANNELS[task],
        **arguments_of(contestant, tokens), **kwargs,
    }  # fmt: skip
    if task == 'segmentation':
        model = smp.Segformer(
            f'tu-pyramid.{NAME}', encoder_weights=True, classes=CLASSES, decoder_segmentation_channels=CHANNELS[task],
            **arguments,
        )  # fmt: skip
        return model, model.encoder.model.vit
    backbone = timm_apvit.pyramid(NAME, pretrained=True, strides=(8, 16, 32), feature_cls='dict', **arguments)
    size = {'min_size': SCENE.side, 'max_size': SCENE.side, 'image_mean': [0.0] * 3, 'image_std': [1.0] * 3}
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(backbone, CLASSES, anchor_generator=anchors, **size), backbone.vit


def batches(samples: Populated, epochs: int, batch: int, seed: int) -> Iterator[tuple[Tensor, list[Places]]]:
    """Images in an order of each epoch's own."""
    for epoch in range(epochs):
        samples.epoch = epoch
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for chosen in order.split(batch):
            images, places = zip(*(samples[index] for index in chosen.tolist()), strict=True)
            yield torch.stack(images), list(places)


def loss_of(task: str, model: nn.Module, images: Tensor, places: list[Places]) -> Tensor:
    """What is trained on; of a segmentation at a quarter of the resolution, which is that of the decoder."""
    if task == 'segmentation':
        logits = model.segmentation_head[0](model.decoder(model.encoder(images)))  # type: ignore[operator, index]
        return F.cross_entropy(logits, torch.stack([each.mask[2::4, 2::4] for each in places]).long())
    targets = [{'boxes': each.boxes, 'labels': each.labels} for each in places]
    return sum(model(list(images), targets).values(), torch.zeros(()))


def wanted_places(places: list[Places]) -> Tensor:
    """How much cells of stride 16 matter: a part of it evenly, the rest on the things, as much on each."""
    cells = SCENE.side // 16
    target = torch.full((len(places), cells, cells), EVEN / cells**2)
    for each, (mask, boxes, labels) in zip(target, places, strict=True):
        for (left, top, right, bottom), label in zip(boxes.long().tolist(), labels, strict=True):
            own = torch.zeros(mask.shape)
            own[top:bottom, left:right] = (mask[top:bottom, left:right] == label).float()
            each += (1 - EVEN) / len(boxes) * F.avg_pool2d(own[None], 16)[0] * 256 / own.sum()
    return target


@torch.inference_mode()
def segmented(model: nn.Module, test: Populated, batch: int) -> dict[str, float]:
    """Mean IoU over classes and background, IoU of all things as one, share of small things' pixels that are found."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    small = torch.zeros(2, dtype=torch.int64)
    for images, places in batches(test, 1, batch, 0):
        for found, truth in zip(model(images).argmax(dim=1), places, strict=True):
            mask = truth.mask.long()
            confusion += torch.bincount((mask * CLASSES + found).flatten(), minlength=CLASSES**2).reshape(CLASSES, -1)
            for (left, top, right, bottom), label in zip(truth.boxes.long().tolist(), truth.labels, strict=True):
                own = mask[top:bottom, left:right] == label
                if own.sum() < SMALL:
                    hit = own & (found[top:bottom, left:right] == label)
                    small += torch.stack([hit.sum(), own.sum()])
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    things = confusion[1:, 1:].sum()
    return {
        'miou': (confusion.diagonal() / union.clamp(min=1))[union > 0].mean().item(),
        'iou_foreground': (things / (confusion.sum() - confusion[0, 0])).item(),
        'recall_small': (small[0] / small[1].clamp(min=1)).item(),
    }


@torch.inference_mode()
def detected(model: nn.Module, test: Populated, batch: int) -> dict[str, float]:
    """COCO's average precision, by its own code; small things are those of a box below `SMALL`."""
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    index = 0
    for images, places in batches(test, 1, batch, 0):
        for output, truth in zip(model(list(images)), places, strict=True):
            index += 1
            for box, label in zip(truth.boxes.tolist(), truth.labels.tolist(), strict=True):
                truths.append({'id': len(truths) + 1, **annotation(index, box, label)})
            rows = zip(output['boxes'].tolist(), output['labels'].tolist(), output['scores'].tolist(), strict=True)
            found += [{**annotation(index, box, label), 'score': score} for box, label, score in rows]
    coco = COCO()
    coco.dataset = {
        'images': [{'id': number + 1} for number in range(index)],
        'annotations': truths,
        'categories': [{'id': number} for number in range(1, CLASSES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        coco.createIndex()
        scores = COCOeval(coco, coco.loadRes(found) if found else COCO(), 'bbox')
        scores.params.areaRng = [[0, 1e9], [0, SMALL], [SMALL, 1e9]]
        scores.params.areaRngLbl = ['all', 'small', 'large']
        scores.evaluate()
        scores.accumulate()
    precision = torch.from_numpy(scores.eval['precision'])[..., -1]  # IoU, recall, class, area
    means = [[each[each > -1].mean().item() for each in part.unbind(-1)] for part in (precision[:1], precision)]
    return {'ap50': means[0][0], 'ap50_small': means[0][1], 'ap50_large': means[0][2], 'ap': means[1][0]}


def annotation(image: int, box: list[float], label: int) -> dict[str, Any]:
    """As COCO has them."""
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    return {'image_id': image, 'bbox': [left, top, w, h], 'area': w * h, 'category_id': label, 'iscrowd': 0}


def multiply_adds(task: str, model: nn.Module) -> float:
    """Of one image, decoder and all, in millions."""
    image = torch.zeros(1, 3, SCENE.side, SCENE.side)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image if task == 'segmentation' else list(image))
    return counter.get_total_flops() / 2e6


def run(options: argparse.Namespace, contestant: str, tokens: int, seed: int) -> None:
    """Train one contestant, and test it on the way, unless its results are there."""
    parts = [options.task, contestant, str(tokens), str(seed), options.label]
    path = options.results / f'{"-".join(filter(None, parts))}.json'
    if path.exists():
        return
    torch.manual_seed(seed)
    model, vit = create(options.task, contestant, tokens, options.weights, **options.model_kwargs)
    cost = multiply_adds(options.task, model.eval())
    train = Populated(SCENE, 'train', options.images // 4, seed + 1)
    test = Populated(SCENE, 'test', options.test_images, TEST_SEED)
    begin = time.perf_counter()
    if contestant == 'crowded':
        fit_saliency(
            vit, ((images, wanted_places(places)) for images, places in batches(train, 1, options.batch, seed))
        )
    groups = param_groups(vit, options.lr, 0.05, 0.75, options.localizer_lr_scale)
    inside = set(vit.parameters())
    groups.append({'params': [p for p in model.parameters() if p not in inside], 'lr': 1e-3, 'weight_decay': 0.05})
    optimizer = torch.optim.AdamW(groups)
    updates = 4 * -(-len(train) // options.batch)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group['lr'] for group in groups], total_steps=updates, pct_start=0.1, cycle_momentum=False
    )
    score, curve = {'segmentation': segmented, 'detection': detected}[options.task], []
    seconds = 0.0
    for update, (images, places) in enumerate(batches(train, 4, options.batch, seed), 1):
        with calls_of(vit.patch_embed) as seen:
            loss = loss_of(options.task, model.train(), images, places)
        if contestant == 'crowded':
            loss = loss + options.saliency_weight * saliency_loss(seen[-1][1].geometry, wanted_places(places))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if update % -(-updates // options.tests) == 0 or update == updates:
            seconds += time.perf_counter() - begin
            metrics = {name: round(value, 4) for name, value in score(model.eval(), test, options.batch).items()}
            curve.append({'images': update * options.batch, 'seconds': round(seconds, 1), **metrics})
            sys.stdout.write(f'{path.stem} loss {loss.item():.3f} {curve[-1]}\n')
            sys.stdout.flush()
            begin = time.perf_counter()
    settings = {name: getattr(options, name) for name in RECORDED}
    facts = {'task': options.task, 'contestant': contestant, 'tokens': tokens, 'seed': seed, 'label': options.label}
    write_report(path, options.threads, **facts, settings=settings, multiply_adds_millions=round(cost), curve=curve)


def report(results: Path, task: str) -> None:
    """Write the table of what has been run."""
    names = METRICS[task]
    lines = [
        f'| contestant | tokens | seed | million multiply-adds | {" | ".join(names)} |',
        '|---' * (4 + len(names)) + '|',
    ]
    found = [json.loads(path.read_text()) for path in sorted(results.glob(f'{task}-*-*.json'))]
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
    add('--task', choices=METRICS, default='segmentation')
    add('--contestants', nargs='+', choices=CONTESTANTS, default=list(CONTESTANTS))
    add('--tokens', nargs='+', type=counted, default=[64])
    add('--seeds', nargs='+', type=number(int, 0), default=[0])
    add('--images', type=counted, default=4_000, help='images seen in a run, each of a quarter of them four times')
    add('--test-images', type=counted, default=300)
    add('--tests', type=counted, default=4, help='times that a run is tested')
    add('--batch', type=counted, default=16)
    add('--lr', type=float, default=3e-4, help='peak learning rate of the ViT; that of all after it is 1e-3')
    add('--localizer-lr-scale', type=float, default=3.0)
    add('--saliency-weight', type=float, default=0.3, help='of the loss that teaches a glance where things are')
    add('--model-kwargs', type=json.loads, default={}, metavar='JSON', help='further arguments of create_model')
    add('--label', default='', help='of what differs, in the name of its results')
    add('--weights', type=Path, help="DINOv2's ViT-S/14")
    add('--threads', type=counted, default=1)
    add('--results', type=Path, default=RESULTS)
    add('--report', action='store_true', help='report only')
    options = parser.parse_args()
    if not options.report and options.weights is None:
        parser.error('expected --weights, the file of the pretrained ViT, got none')
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
