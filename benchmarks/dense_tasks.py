"""What the benchmark of dense tasks has to learn: images, what is where on them, and how long it is trained."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contestants import SCRATCH
from dense_scores import detected, segmented
from fashion import NAMES, load_several
from photographs import CATEGORIES, Places, Populated, Scene
from torch import Tensor

SCENE = Scene(areas=(0.005, 0.1))
# Share of what matters that is spread evenly.
EVEN = 0.05


class Task(NamedTuple):
    """What is to be learnt.

    Attributes:
        load: a split by name, number of images and seed.
        side: of an image, in pixels.
        names: of the classes; 0 is the background.
        score: of a model in eval mode; the first of its figures is what the task is about.
        channels: of the pyramid and the decoder.
        small: share of an image's area; things below are small.
        passes: parts of the training, each of other images.
        batch: images of an update.
        lr: peak learning rate of the ViT; that of all after it is 1e-3.
        localizer_lr_scale: of the adaptive layers, in that.
        layer_decay: of the ViT's learning rates.
        area_power: how much a thing matters for patches that crowd is its area to this power: 0, where things are
            counted, all alike; where pixels are, the large ones more.
        saliency_side: pixels along the side of what says where they crowd.
        arguments: of ``create_model``; None: those of the pretrained ViT.
    """

    load: Callable[[str, int, int], Any]
    side: int
    names: tuple[str, ...]
    score: Callable[..., dict[str, float]]
    channels: int
    small: float = 0.02
    passes: int = 4
    batch: int = 16
    lr: float = 3e-4
    localizer_lr_scale: float = 3.0
    layer_decay: float = 0.75
    area_power: float = 0.0
    saliency_side: int = 224
    arguments: dict[str, Any] | None = None


def populated(split: str, length: int, seed: int) -> Populated:
    """Things of all categories on photographs."""
    return Populated(SCENE, split, length, seed)


# The other benchmarks' ViT, with six blocks rather than four, as smp has a ``depth`` of its own.
OF_SCRATCH = {'in_chans': 1, **{name: value for name, value in SCRATCH.items() if name != 'depth'}}
FROM_SCRATCH: dict[str, Any] = {
    'small': 0.03, 'passes': 1, 'batch': 32, 'lr': 1e-3, 'localizer_lr_scale': 1.0, 'layer_decay': 1.0,
    'saliency_side': 128, 'arguments': OF_SCRATCH,
}  # fmt: skip
TASKS = {
    'segmentation': Task(populated, SCENE.side, CATEGORIES, segmented, 48, area_power=0.5),
    'detection': Task(populated, SCENE.side, CATEGORIES, detected, 64),
    'scratch': Task(load_several, 224, NAMES, segmented, 32, area_power=0.5, **FROM_SCRATCH),
    'scratch-detection': Task(load_several, 224, NAMES, detected, 64, **FROM_SCRATCH),
}


def batches(samples: Any, epochs: int, batch: int, seed: int) -> Iterator[tuple[Tensor, list[Places]]]:
    """Images in an order of each epoch's own."""
    for epoch in range(epochs):
        samples.epoch = epoch
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for chosen in order.split(batch):
            images, places = zip(*(samples[index] for index in chosen.tolist()), strict=True)
            yield torch.stack(images), list(places)


def wanted_places(task: Task, places: list[Places]) -> Tensor:
    """How much cells of stride 16 matter: a part of it evenly, the rest on the things, as far as the task tells."""
    cells = places[0].mask.shape[0] // 16
    target = torch.full((len(places), cells, cells), EVEN / cells**2)
    for each, (mask, boxes, labels) in zip(target, places, strict=True):
        things = torch.zeros(cells, cells)
        for (left, top, right, bottom), label in zip(boxes.long().tolist(), labels, strict=True):
            own = torch.zeros(mask.shape)
            inside = mask[top:bottom, left:right] == label if task.score is segmented else torch.tensor(True)
            own[top:bottom, left:right] = inside.float()
            things += F.avg_pool2d(own[None], 16)[0] * own.sum() ** (task.area_power - 1)
        if len(boxes):
            each += (1 - EVEN) / things.sum() * things
    return target


class Taught:
    """Images and where they matter, in batches: all that a training sees."""

    def __init__(self, task: Task, samples: Any, batch: int, seed: int) -> None:
        self.task, self.arguments = task, (samples, task.passes, batch, seed)

    def __len__(self) -> int:
        samples, epochs, batch, _ = self.arguments
        return epochs * -(-len(samples) // batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, wanted_places(self.task, places)) for images, places in batches(*self.arguments))
