"""What do frozen features tell? A linear probe of photographs by how finely, and where, a ViT looks at them.

    python benchmarks/probe.py --weights FILE [--grids 4 8 16 32] [--images 1200] [--test-images 400] [--output FILE]

The ViT is DINOv2's ViT-S/14 as it was trained; of each scene of 448 pixels it sees a grid of patches of the whole, or
(`object`) 8 x 8 of the square about the thing by ground truth. A logistic regression reads the class token and the mean
of the others. So what a finer grid could know can be had where it is too dear to train.
"""

import argparse
import sys
import time
from typing import Any

import timm
import torch
from contestants import DINOV2_PATCH
from environment import counted, new_file, write_report
from photographs import SCENES, TEST_SEED, Photographed
from torch import Tensor, nn
from torch.nn.functional import interpolate

OBJECT = 'object'
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
KEPT = 0.8  # share of the training images by which the penalty is not chosen


@torch.no_grad()
def features(vit: Any, scenes: Photographed, number: int, grid: int) -> tuple[Tensor, Tensor]:
    """Class token and mean of the others ``(n, 2 D)``, and labels."""
    side, found, labels = grid * DINOV2_PATCH, [], []
    for n in range(number):
        image, label = scenes[n]
        tokens = vit.forward_features(interpolate(image[None], (side, side), mode='bilinear', antialias=True))
        found.append(torch.cat([tokens[:, 0], tokens[:, vit.num_prefix_tokens :].mean(dim=1)], dim=1))
        labels.append(label)
    return torch.cat(found), torch.tensor(labels)


def fitted(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """A logistic regression."""
    layer = nn.Linear(inputs.shape[1], classes)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(inputs), labels) + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def top1(layer: nn.Linear, inputs: Tensor, labels: Tensor) -> float:
    """Accuracy in [0, 1]."""
    return float((layer(inputs).argmax(dim=1) == labels).float().mean())


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int) -> dict[str, float]:
    """Accuracy on the test images, with the penalty that is best on a part of the training images."""
    mean, std = train[0].mean(dim=0), train[0].std(dim=0)
    (inputs, labels), (others, wanted) = ((((x - mean) / std), y) for x, y in (train, test))
    kept = int(KEPT * len(inputs))
    tried = {
        penalty: top1(fitted(inputs[:kept], labels[:kept], classes, penalty), inputs[kept:], labels[kept:])
        for penalty in PENALTIES
    }
    best = max(PENALTIES, key=tried.__getitem__)
    return {'penalty': best, 'top1': top1(fitted(inputs, labels, classes, best), others, wanted)}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', required=True, help="DINOv2's ViT-S/14")
    parser.add_argument('--grids', nargs='+', type=counted, default=[4, 8, 16, 32])
    parser.add_argument('--images', type=counted, default=1200)
    parser.add_argument('--test-images', type=counted, default=400)
    parser.add_argument('--threads', type=counted, default=1)
    parser.add_argument('--output', type=new_file)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scene, rows = SCENES['photographs'], []
    overlay = {'file': args.weights}
    vit = timm.create_model('vit_small_patch14_dinov2', pretrained=True, num_classes=0, dynamic_img_size=True,
                            pretrained_cfg_overlay=overlay).eval()  # fmt: skip
    for name, grid in ((OBJECT, 8), *((f'{grid} x {grid}', grid) for grid in args.grids)):
        crop = grid * DINOV2_PATCH if name == OBJECT else None
        splits = Photographed(scene, 'train', args.images, 1, crop), Photographed(scene, 'test', 1000, TEST_SEED, crop)
        begun = time.monotonic()
        seen = [features(vit, *each, grid) for each in zip(splits, (args.images, args.test_images), strict=True)]
        seconds = time.monotonic() - begun
        rows.append({'sees': name, 'tokens': grid * grid, **probe(*seen, len(splits[0].names)), 'seconds': seconds})
        sys.stdout.write(f'{name:<8} {grid * grid:>5} tokens  top-1 {rows[-1]["top1"]:.3f}  {seconds:.0f} s\n')
        sys.stdout.flush()
    if args.output:
        write_report(args.output, args.threads, images=args.images, test_images=args.test_images, rows=rows)


if __name__ == '__main__':
    main()
