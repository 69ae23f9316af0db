"""The benchmark's natural images: a small thing among pieces of others, on photographs.

The things are clip art with transparency, the photographs those that come with Debian's `openclipart-png` and
`opencv-doc` and with scikit-image, so nothing is downloaded. Training and test have different photographs, and where
classes are categories different things of them: what is learnt is not the recognition of a file.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from timm_apvit.finetuning.samples import Samples, Splits

CLIP_ART = Path('/usr/share/openclipart/png')
OPENCV = Path('/usr/share/doc/opencv-doc/examples')
SKIMAGE = Path(skimage.__file__).parent / 'data'
TEST_SEED = 0
# Of the stored things, the longer side in pixels; some files are posters.
LARGEST, SMALLEST = 384, 100
MOST_BYTES = 200_000
# Of a thing's box, the share that is opaque, and the ratio of the sides: no lines and no frames.
LEAST_OPAQUE, GREATEST_ASPECT = 0.35, 2.0
# Photographs, by what they are for.
BACKGROUNDS = {
    'train': [
        *(SKIMAGE / name for name in ('astronaut.png', 'coffee.png', 'motorcycle_left.png')),
        OPENCV / 'alphamat/input_images/plant.jpg',
        *(
            OPENCV / 'data' / name
            for name in (
                'aero1.jpg', 'aloeL.jpg', 'baboon.jpg', 'board.jpg', 'butterfly.jpg', 'fruits.jpg', 'graf1.png',
                'home.jpg', 'leuvenA.jpg', 'messi5.jpg', 'orange.jpg', 'stuff.jpg',
            )
        ),
        *(
            OPENCV / 'text' / f'scenetext{name}.jpg'
            for name in ('01', '03', '05', '_segmented_word01', '_segmented_word03')
        ),
    ],
    'test': [
        *(SKIMAGE / name for name in ('chelsea.png', 'rocket.jpg')),
        *(
            OPENCV / 'data' / name
            for name in (
                'apple.jpg', 'building.jpg', 'left.jpg', 'licenseplate_motion.jpg', 'rubberwhale1.png',
                'squirrel_cls.jpg', 'starry_night.jpg',
            )
        ),
        *(OPENCV / 'text' / f'scenetext{name}.jpg' for name in ('02', '04', '06', '_segmented_word02')),
    ],
}  # fmt: skip
# Folders of things; by these names where classes are categories.
CATEGORIES = (
    'animals/birds', 'animals/bugs', 'animals/mammals', 'buildings/homes', 'computer/hardware', 'food/beverages',
    'food/desserts', 'food/fruit', 'people/clothing', 'plants/flowers', 'recreation/music', 'recreation/sports',
    'recreation/toys', 'transportation/roadsigns', 'transportation/vehicles',
)  # fmt: skip
THINGS_EACH = 4


class Scene(NamedTuple):
    """What is to be learnt.

    Attributes:
        side: of the image, in pixels.
        areas: least and greatest share of the image that the thing covers; None: it fills the image, without pieces.
        categories: whether classes are categories, tested on things that were not trained on, rather than things.
        pieces: of other things, around it.
        cut: side of a piece, as a fraction of its thing's.
        test_images: of the fixed test set.
        period: epochs after which the training images come again.
    """

    side: int = 448
    areas: tuple[float, float] | None = (0.003, 0.06)
    categories: bool = False
    pieces: int = 8
    cut: float = 0.45
    test_images: int = 1_000
    period: int = 4


SCENES = {
    'photographs': Scene(),
    'photographs-672': Scene(side=672),
    'categories': Scene(categories=True),
    'filling': Scene(areas=None),
}


def _order(path: Path) -> str:
    """By chance, but the same everywhere."""
    return hashlib.sha256(path.name.encode()).hexdigest()


def _thing(path: Path) -> Image.Image | None:
    """A thing cut out of its file, with its transparency premultiplied; None: it is none of those wanted."""
    image = Image.open(path).convert('RGBA')
    box = image.getchannel('A').point(lambda alpha: 255 * (alpha > 127)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    opaque = np.asarray(image.getchannel('A')).mean() / 255
    aspect = max(image.size) / min(image.size)
    if max(image.size) < SMALLEST or not LEAST_OPAQUE <= opaque < 0.98 or aspect > GREATEST_ASPECT:
        return None
    image = image.convert('RGBa')
    image.thumbnail((LARGEST, LARGEST))
    return image


@cache
def load_things(categories: bool, split: str) -> tuple[list[Image.Image], list[int], tuple[str, ...]]:
    """Things, their labels, and the names of the classes.

    Raises:
        FileNotFoundError: the clip art is not installed.
    """
    if not CLIP_ART.is_dir():
        raise FileNotFoundError(f"expected the clip art of Debian's openclipart-png in {CLIP_ART}, got no such folder")
    things, labels, names = [], [], []
    for category in CATEGORIES:
        paths = sorted((CLIP_ART / category).rglob('*.png'), key=_order)
        small = [path for path in paths if path.stat().st_size < MOST_BYTES]
        found = [(path.stem, thing) for path in small if (thing := _thing(path)) is not None]
        if categories:  # two thirds of a category are for training
            chosen = found[: 2 * len(found) // 3] if split == 'train' else found[2 * len(found) // 3 :]
            labels += [len(names)] * len(chosen)
            names.append(category)
        else:
            chosen = found[:THINGS_EACH]
            labels += range(len(names), len(names) + len(chosen))
            names += [name for name, _ in chosen]
        things += [thing for _, thing in chosen]
    return things, labels, tuple(names)


class Photographed(Samples):
    """Things on photographs: ``samples[index]`` -> ``(3, H, W)``, label.

    Args:
        scene: how they lie.
        split: ``'train'`` or ``'test'``, which have different photographs.
        length: of an epoch.
        seed: of the images, with the epoch and the index.
        crop: side in pixels; of each image the thing's own box is taken, and resized to it: the ceiling. None: all.
        margin: side of what is cropped, in that of the box.
    """

    def __init__(
        self, scene: Scene, split: str, length: int, seed: int, crop: int | None = None, margin: float = 1.3
    ) -> None:
        super().__init__(length, seed)
        self.scene, self.crop, self.margin = scene, crop, margin
        self.things, labels, self.names = load_things(scene.categories, split)
        self.classes = np.array(labels)
        self.backgrounds = [Image.open(path).convert('RGB') for path in BACKGROUNDS[split]]
        self.kept: dict[tuple[int, int], tuple[Image.Image, int, tuple[int, int, int, int]]] = {}
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        canvas, label, box = self.compose(index)
        if self.crop is not None:
            canvas = self._cropped(canvas, box, self.crop)
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std, label

    def compose(self, index: int) -> tuple[Image.Image, int, tuple[int, int, int, int]]:
        """Canvas, label, and the box of the thing: left, top, right, bottom; made once and kept (0.6 MB at 448 px)."""
        key = (self.epoch % self.scene.period, index)
        if key not in self.kept:
            self.kept[key] = self._composed(index)
        return self.kept[key]

    def _composed(self, index: int) -> tuple[Image.Image, int, tuple[int, int, int, int]]:
        scene = self.scene
        rng = np.random.default_rng((self.seed, self.epoch % scene.period, index))
        canvas = self._background(rng)
        label = int(rng.integers(len(self.names)))
        number = int(rng.choice(np.flatnonzero(self.classes == label)))
        if scene.areas is None:
            thing = self.things[number]
            size = tuple(round(length * scene.side / max(thing.size)) for length in thing.size)
            return canvas, label, self._paste(canvas, thing.resize(size), rng)
        others = rng.integers(len(self.things), size=scene.pieces).tolist()
        for other in others:
            if self.classes[other] != label:
                thing = self._resized(self.things[other], rng)
                w, h = (max(1, round(scene.cut * length)) for length in thing.size)
                x, y = (int(rng.random() * (a - b)) for a, b in zip(thing.size, (w, h), strict=True))
                self._paste(canvas, thing.crop((x, y, x + w, y + h)), rng)
        box = self._paste(canvas, self._resized(self.things[number], rng), rng)
        return canvas, label, box

    def _background(self, rng: np.random.Generator) -> Image.Image:
        """Half to all of a photograph's shorter side, mirrored or not."""
        image = self.backgrounds[int(rng.integers(len(self.backgrounds)))]
        side = min(image.size) * rng.uniform(0.5, 1.0)
        x, y = (rng.random() * (length - side) for length in image.size)
        canvas = image.resize((self.scene.side, self.scene.side), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        return canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else canvas

    def _resized(self, thing: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A thing that covers as much as it is to, drawn evenly in the root of the area; at most half of a side."""
        least, most = (area**0.5 for area in self.scene.areas or (1.0, 1.0))
        wanted = self.scene.side * rng.uniform(least, most)
        opaque = np.asarray(thing.getchannel('a')).sum() / 255
        scale = min(wanted / opaque**0.5, self.scene.side / 2 / max(thing.size))
        w, h = (max(1, round(scale * length)) for length in thing.size)
        return thing.resize((w, h), Image.Resampling.BICUBIC)

    def _paste(self, canvas: Image.Image, thing: Image.Image, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Put a thing, whose transparency is premultiplied, wholly inside the canvas."""
        x, y = (int(rng.random() * (a - b + 1)) for a, b in zip(canvas.size, thing.size, strict=True))
        straight = thing.convert('RGBA')
        canvas.paste(straight, (x, y), straight.getchannel('A'))
        return x, y, x + thing.size[0], y + thing.size[1]

    def _cropped(self, canvas: Image.Image, box: tuple[int, int, int, int], side: int) -> Image.Image:
        """The square about a box, inside the canvas."""
        left, top, right, bottom = box
        half = min(self.margin * max(right - left, bottom - top), self.scene.side) / 2
        x, y = (min(max((a + b) / 2, half), self.scene.side - half) for a, b in ((left, right), (top, bottom)))
        size = (side, side)
        return canvas.resize(size, Image.Resampling.BICUBIC, (x - half, y - half, x + half, y + half))


def load_scenes(scene: Scene, seed: int, images: int, crop: int | None = None) -> Splits:
    """Training data of ``images`` samples an epoch, and the fixed test set."""
    train = Photographed(scene, 'train', images, seed, crop)
    test = Photographed(scene, 'test', scene.test_images, TEST_SEED, crop)
    return Splits(train, test, train.names)


class Populated(Photographed):
    """Several things on a photograph: ``samples[index]`` -> ``(3, H, W)``, and what is where as a `Places`.

    Classes are the categories, of things of which each was seen in training; 0 is the background.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, 'Places']:  # type: ignore[override]
        key = (self.epoch % self.scene.period, index)
        if key not in self.populated:
            self.populated[key] = self._populate(index)
        canvas, places = self.populated[key]
        return (torch.from_numpy(canvas).permute(2, 0, 1).float() / 255 - self.mean) / self.std, places

    def __init__(self, scene: Scene, split: str, length: int, seed: int, things: tuple[int, int] = (2, 6)) -> None:
        super().__init__(scene, split, length, seed)
        self.number_of_things = things
        self.populated: dict[tuple[int, int], tuple[np.ndarray, Places]] = {}

    def _populate(self, index: int) -> tuple[np.ndarray, 'Places']:
        """Things one over the other; one of which less than a third is to be seen is not among them."""
        rng = np.random.default_rng((self.seed, self.epoch % self.scene.period, index))
        canvas, pasted = self._background(rng), []
        owner = Image.new('L', canvas.size)
        for order in range(1, 1 + int(rng.integers(self.number_of_things[0], self.number_of_things[1] + 1))):
            number = int(rng.integers(len(self.things)))
            thing = self._resized(self.things[number], rng)
            x, y, _, _ = self._paste(canvas, thing, rng)
            opaque = thing.getchannel('a').point(lambda alpha: 255 * (alpha > 127))
            owner.paste(order, (x, y), opaque)
            pasted.append((order, self.classes[number] // THINGS_EACH + 1, np.count_nonzero(opaque)))
        owners = np.asarray(owner)
        mask, boxes, labels = np.zeros(owners.shape, np.uint8), [], []
        for order, label, opaque in pasted:
            rows, columns = np.nonzero(owners == order)
            mask[rows, columns] = label
            if 3 * len(rows) >= opaque:
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(label)
        return np.array(canvas), Places(
            torch.from_numpy(mask), torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels)
        )


class Places(NamedTuple):
    """What is where on an image: classes of its pixels ``(H, W)``, and boxes ``(n, 4)`` in pixels with labels."""

    mask: Tensor
    boxes: Tensor
    labels: Tensor
