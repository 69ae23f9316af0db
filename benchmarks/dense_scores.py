"""How well a model segments, and how well it detects."""

import contextlib
import io
from collections.abc import Iterable
from typing import Any

import torch
from photographs import Places
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

# Images and what is where on them.
Batches = Iterable[tuple[Tensor, list[Places]]]


@torch.inference_mode()
def segmented(model: nn.Module, test: Batches, classes: int, small_area: float) -> dict[str, float]:
    """Mean IoU over classes and background, IoU of all things as one, share of small things' pixels that are found."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    small = torch.zeros(2, dtype=torch.int64)
    for images, places in test:
        for found, truth in zip(model(images).argmax(dim=1), places, strict=True):
            mask = truth.mask.long()
            confusion += torch.bincount((mask * classes + found).flatten(), minlength=classes**2).reshape(classes, -1)
            for (left, top, right, bottom), label in zip(truth.boxes.long().tolist(), truth.labels, strict=True):
                own = mask[top:bottom, left:right] == label
                if own.sum() < small_area:
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
def detected(model: nn.Module, test: Batches, classes: int, small_area: float) -> dict[str, float]:
    """COCO's average precision, by its own code; small things are those of a box below ``small_area`` pixels."""
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    index = 0
    for images, places in test:
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
        'categories': [{'id': number} for number in range(1, classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        coco.createIndex()
        scores = COCOeval(coco, coco.loadRes(found) if found else COCO(), 'bbox')
        scores.params.areaRng = [[0, 1e9], [0, small_area], [small_area, 1e9]]
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
