"""Any image file that Pillow reads becomes the picture that people see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_apvit.pictures.images import LONGEST, read_image

# A ramp to the right in red and downwards in green: it shows a flip, a turn and a scale.
RAMP = np.zeros((12, 20, 3), dtype=np.uint8)
RAMP[..., 0], RAMP[..., 1] = np.linspace(0, 255, 20)[None], np.linspace(0, 255, 12)[:, None]


def as_array(image: torch.Tensor) -> np.ndarray[Any, Any]:
    return image.permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize('orientation', range(1, 9))
def test_convention_exif_orientation_is_respected(tmp_path: Path, orientation: int) -> None:
    # What a camera stores so that the orientation makes it upright: the inverses, by the EXIF standard.
    stored = {
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.transpose(1, 0, 2),
        6: RAMP.transpose(1, 0, 2)[::-1],
        7: RAMP.transpose(1, 0, 2)[::-1, ::-1],
        8: RAMP.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / 'x.png', exif=exif)
    np.testing.assert_allclose(as_array(read_image(tmp_path / 'x.png')), RAMP, atol=0.01)


@pytest.mark.parametrize(
    ('mode', 'suffix'),
    [('RGB', 'png'), ('RGBA', 'png'), ('CMYK', 'tif'), ('P', 'png'), ('YCbCr', 'tif'), ('RGB', 'bmp'), ('RGB', 'webp'),
     ('RGB', 'jpg'), ('CMYK', 'jpg')],
)  # fmt: skip
def test_colours_of_every_mode_are_right(tmp_path: Path, mode: str, suffix: str) -> None:
    file = tmp_path / f'x.{suffix}'
    image = Image.fromarray(RAMP).quantize(256) if mode == 'P' else Image.fromarray(RAMP).convert(mode)
    image.save(file, **({'lossless': True} if suffix == 'webp' else {'quality': 95} if suffix == 'jpg' else {}))
    with Image.open(file) as stored:
        if stored.mode != mode:
            pytest.skip(f'This Pillow opens {mode} in .{suffix} as {stored.mode}.')
    assert np.abs(as_array(read_image(file)) - RAMP).mean() < 6


def test_grey_16_bits_are_kept(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / 'x.png')
    image = read_image(tmp_path / 'x.png')
    assert image.shape == (3, 30, 40)
    np.testing.assert_allclose(image[1].numpy() * 65535, values, atol=0.02)
    assert len(image.unique()) > 1000


@pytest.mark.parametrize('scale', [1.0, 3.0])
def test_floats_are_taken_as_they_are_or_stretched(tmp_path: Path, scale: float) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values * scale).save(tmp_path / 'x.tif')
    np.testing.assert_allclose(read_image(tmp_path / 'x.tif')[0].numpy(), values, atol=1e-6)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'L'])
def test_what_is_transparent_lies_on_white(tmp_path: Path, mode: str) -> None:
    if mode in ('RGBA', 'LA'):
        image = Image.new(mode, (4, 3))
        image.putpixel((0, 0), (0, 0, 0, 255) if mode == 'RGBA' else (0, 255))
        image.save(tmp_path / 'x.png')
    else:
        image = Image.new(mode, (4, 3), 7)
        if mode == 'P':
            image.putpalette([0, 0, 0] * 256)
        image.putpixel((0, 0), 0)
        image.save(tmp_path / 'x.png', transparency=7)
    pixels = read_image(tmp_path / 'x.png')
    assert (pixels[:, 0, 0] == 0).all()
    assert (pixels[:, 1:] == 1).all()


def test_shape_of_grey_models_and_of_tiny_and_huge_images(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 3000), (5000, 1), (2400, 1600)):
        Image.new('RGB', size, (255, 0, 0)).save(tmp_path / 'x.png')
        for channels in (1, 3):
            image = read_image(tmp_path / 'x.png', channels)
            longest = min(max(size), LONGEST)
            expected = (channels, *(max(1, round(side * longest / max(size))) for side in size[::-1]))
            assert image.shape == expected
            assert image[0].mean() == pytest.approx(1.0 if channels == 3 else 0.2990, abs=0.01)
    assert read_image(tmp_path / 'x.png', longest=48).shape == (3, 32, 48)


def test_arrays_pillow_images_and_animations_are_read(tmp_path: Path) -> None:
    np.testing.assert_allclose(as_array(read_image(RAMP)), RAMP, atol=0.01)
    np.testing.assert_allclose(as_array(read_image(Image.fromarray(RAMP))), RAMP, atol=0.01)
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'x.gif', save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / 'x.gif')[:, 0, 0].tolist() == [1, 0, 0]


def test_rejects_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / 'text.jpg').write_text('not an image\n')
    (tmp_path / 'empty.png').write_bytes(b'')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(tmp_path / 'x.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'x.png').read_bytes()[:9000])
    for name, reason in (
        ('text.jpg', 'does not know its format'),
        ('empty.png', 'does not know its format'),
        ('cut.png', 'truncated'),
    ):
        with pytest.raises(
            ValueError, match=f"expected an image file, got '.*{name}', which cannot be read: .*{reason}"
        ):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"expected an image file, got '.*none.png', which does not exist"):
        read_image(tmp_path / 'none.png')
    with pytest.raises(FileNotFoundError, match='which is a folder'):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (torch.rand(2, 4, 4), r'shape \(3, H, W\), got \[2, 4, 4\]'),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), 'got dtype torch.uint8'),
        (torch.randn(3, 9, 9), 'before they are normalised'),
        (torch.full((3, 2, 2), torch.nan), 'before they are normalised'),
        (torch.zeros(3, 0, 4), r'got \[3, 0, 4\]'),
        (np.zeros((4, 4, 3)), 'of uint8, got .* of float64'),
        (7, 'a path, a Pillow image, an array or a tensor, got 7'),
    ],
)
def test_rejects_other_values(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(image)


def test_rejects_files_for_models_of_other_channels() -> None:
    with pytest.raises(ValueError, match='expected a tensor of 5 channels, as the model takes'):
        read_image(RAMP, in_chans=5)
