"""Images as a model takes them: its size and normalisation, and any image file Pillow reads as a tensor."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import resolve_data_config
from torch import Tensor

from timm_apvit.files import AnyPath
from timm_apvit.models.mixin import APViT

AnyImage = Tensor | np.ndarray[Any, Any] | Image.Image | AnyPath

# Longer side of what is made of an image file: no screen shows more, and a photograph of 100 megapixels takes minutes.
LONGEST = 1024
ELONGATED = 64
ORIENTATION = 0x0112  # key of EXIF
WITH_ALPHA = ('RGBA', 'LA', 'PA', 'La', 'RGBa')
DEEP = ('I;16', 'I;16B', 'I;16L', 'I;16N', 'I', 'F')


def image_config(model: Any) -> dict[str, Any]:
    """Size and normalisation of the images that a model of timm takes."""
    if not isinstance(model, APViT):
        return dict(resolve_data_config({}, model=model))
    in_chans = model.patch_embed.patching.in_chans
    img_size: tuple[int, int] = model.patch_embed.img_size
    own = {key: model.pretrained_cfg.get(key) for key in ('mean', 'std')}
    # Else timm warns of each that is not of as many channels.
    fitting = {key: per_channel(value, in_chans) for key, value in own.items() if value}
    return dict(resolve_data_config({'input_size': (in_chans, *img_size), **fitting}, model=model))


def normalisation_of(model: APViT) -> dict[str, Any]:
    """Mean and standard deviation for a configuration, of as many channels as the model has: else timm warns."""
    return {key: value for key, value in image_config(model).items() if key in ('mean', 'std')}


def per_channel(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """A value for each of C channels: those given, or their mean if they are of as many others."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def read_image(source: AnyImage, in_chans: int = 3, longest: int | None = None) -> Tensor:
    """Read an image: a file that Pillow reads, its image, an array or a tensor -> ``(C, H, W)`` in [0, 1].

    A file is turned upright as its EXIF orientation says; what is transparent lies on white; of an animation the first
    frame is taken. 16 bits are kept; the values of an image of floating-point numbers, or of 32 bits, are taken as
    they are if they fit [0, 1] or 16 bits, and are stretched to [0, 1] if not.

    Args:
        source: a path; an image of Pillow; an array ``(H, W)`` or ``(H, W, 3 or 4)`` of bytes; or a floating-point
            tensor ``(C, H, W)`` of values in [0, 1], which is returned as it is.
        in_chans: C, 1 or 3, but for tensors.
        longest: side to which the longer one is resized, larger or smaller, of all but tensors; None: 1024 if it is
            larger.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is damaged, or does not have C channels.
    """
    if isinstance(source, Tensor):
        return _checked(source, in_chans)
    if in_chans not in (1, 3):
        raise ValueError(f'expected a tensor of {in_chans} channels, as the model takes, got an image of 1 or 3')
    if isinstance(source, np.ndarray):
        return _pixels(Image.fromarray(_checked_array(source)), in_chans, longest)
    if isinstance(source, Image.Image):
        return _pixels(ImageOps.exif_transpose(source), in_chans, longest)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f'expected an image: a path, a Pillow image, an array or a tensor, got {source!r:.80}')
    if isinstance(source, str) and source.startswith(('http://', 'https://')):
        raise FileNotFoundError(f'expected an image file, got {source!r}, which has to be downloaded first')
    with opened(Path(source)) as image:
        return _pixels(image, in_chans, longest)


def eight_bit(image: Image.Image, in_chans: int) -> Image.Image:
    """An image of Pillow in 8 bits a channel, of mode L or RGB, with the pixels that `read_image` sees.

    So what a model is trained and tested on is what is drawn: upright, on white, and of deep ones the same contrast. Of
    one that is more than 64 times as long as wide it is the middle: resized, the whole of it would fill the memory.
    """
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in DEEP:
        image = Image.fromarray((255 * np.asarray(_deep(image))).round().astype(np.uint8))
    longest = ELONGATED * min(image.size)
    if max(image.size) > longest:
        left, top = (max(0, (length - longest) // 2) for length in image.size)
        image = image.crop((left, top, min(image.width, left + longest), min(image.height, top + longest)))
    return _on_white(image).convert('L' if in_chans == 1 else 'RGB')


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file, upright.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image or is damaged, as far as what is done with it shows.
    """
    if not path.is_file():
        what = 'which is a folder' if path.is_dir() else 'which does not exist'
        raise FileNotFoundError(f'expected an image file, got {str(path)!r}, {what}')
    try:
        with warnings.catch_warnings():
            # Of metadata that Pillow cannot make sense of, and of sizes that it takes for an attack; from twice that
            # size on it refuses them.
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                yield image
    # Damaged files fail in as many ways as there are formats.
    except Exception as error:
        raise ValueError(unreadable(path, error)) from error


def unreadable(path: AnyPath, error: Exception) -> str:
    """Say in a sentence why an image file cannot be read."""
    reason = ' '.join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and 'cannot identify' in reason:
        reason = 'Pillow does not know its format'
    return f'expected an image file, got {str(path)!r}, which cannot be read: {reason}'


def _pixels(image: Image.Image, in_chans: int, longest: int | None) -> Tensor:
    """An image of Pillow as ``(C, H, W)`` in [0, 1]."""
    most = max(image.size)
    side = min(most, LONGEST) if longest is None else longest
    size = [max(1, round(length * side / most)) for length in image.size]
    image = _deep(image) if image.mode in DEEP else _on_white(image).convert('L' if in_chans == 1 else 'RGB')
    if size != list(image.size):
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    values = torch.from_numpy(np.array(image))
    if values.dim() == 2:
        return (values.float() / (255 if values.dtype == torch.uint8 else 1)).clamp(0, 1).expand(in_chans, -1, -1)
    return values.permute(2, 0, 1).float() / 255


def _deep(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits, as floating-point numbers in [0, 1]."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    if image.mode != 'F' and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return Image.fromarray((values - low) / max(high - low, 1e-12))


def _on_white(image: Image.Image) -> Image.Image:
    """An image with what is transparent on white."""
    if image.mode not in WITH_ALPHA and 'transparency' not in image.info:
        return image
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)


def _checked_array(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array; raise ValueError unless it is an image of bytes."""
    channels_last = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not channels_last or image.size == 0:
        raise ValueError(
            f'expected an array (H, W) or (H, W, 3 or 4) of uint8, got {list(image.shape)} of {image.dtype}'
        )
    return image


def _checked(image: Tensor, in_chans: int) -> Tensor:
    """Return a tensor ``(C, H, W)``; raise ValueError if it is none, or not of values in [0, 1]."""
    if image.dim() != 3 or image.shape[0] != in_chans or image.numel() == 0:
        raise ValueError(f'expected an image of shape ({in_chans}, H, W), got {list(image.shape)}')
    if not image.is_floating_point():
        raise ValueError(f'expected an image of floating-point values in [0, 1], got dtype {image.dtype}')
    image = image.detach()
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f'expected an image of values in [0, 1], before they are normalised, got some in [{low:g}, {high:g}]'
        )
    return image
