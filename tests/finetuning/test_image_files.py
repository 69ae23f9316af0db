"""The same picture is the same input everywhere: in training and tests, in pictures, and in predictions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from timm_apvit.finetuning.image_files import read_folder
from timm_apvit.pictures.images import read_image

# Endings of formats without loss, and the modes of Pillow that each holds.
FORMATS = {
    'png': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'),
    'tiff': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'),
    'webp': ('RGB', 'RGBA'),
    'gif': ('L', 'P'),
    'TGA': ('L', 'RGB', 'RGBA'),
    'bmp': ('1', 'L', 'P', 'RGB'),
}
KINDS = [(ending, mode) for ending, modes in FORMATS.items() for mode in modes]


def an_image(mode: str, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Noise of a mode, some of it transparent where that can be."""
    if mode == 'I;16':
        return Image.fromarray(rng.integers(65536, size=size, dtype=np.uint16))
    if mode == 'I':
        return Image.fromarray(rng.integers(2**24, size=size, dtype=np.int32))
    if mode == 'F':
        return Image.fromarray(rng.random(size, dtype=np.float32))
    image = Image.fromarray(rng.integers(256, size=(*size, 4), dtype=np.uint8), 'RGBA')
    return image if mode == 'RGBA' else image.convert(mode if mode in ('LA',) else 'RGB').convert(mode)


def expected(image: Image.Image, mode: str) -> Image.Image:
    """Pillow's own conversion, on white where it is transparent; of deep images, their range in 8 bits."""
    values = np.asarray(image)
    if mode == 'I;16':
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert('RGB')
    if mode == 'I':
        low, high = values.min(), values.max()
        low, high = (0, 65535) if low >= 0 and high <= 65535 else (low, high)
        return Image.fromarray((255 * ((values - low) / max(high - low, 1e-12))).round().astype(np.uint8)).convert(
            'RGB'
        )
    if mode == 'F':
        return Image.fromarray((255 * values).round().astype(np.uint8)).convert('RGB')
    if mode in ('LA', 'RGBA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('RGB')


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 99), turned=st.sampled_from([None, 1, 3, 6, 8]), data=st.data())
def test_an_image_file_is_read_alike_by_all(
    kind: tuple[str, str], seed: int, turned: int | None, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ending, mode = kind
    folder = tmp_path_factory.mktemp('images')
    (folder / 'a').mkdir()
    path = folder / 'a' / f'1.{ending}'
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    image = an_image(mode, np.random.default_rng(seed), size)
    options: dict[str, Any] = {'lossless': True, 'exact': True} if ending == 'webp' else {}
    if turned is not None and ending in ('png', 'webp', 'tiff'):
        exif = Image.Exif()
        exif[0x0112] = turned
        options['exif'] = exif
    if mode == 'P' and ending == 'png':
        options['transparency'] = 0
    image.save(path, **options)
    files = read_folder(folder)
    files.transform = np.asarray
    seen, label = files[0]
    assert label == 0
    with Image.open(path) as saved:
        wanted = np.asarray(expected(ImageOps.exif_transpose(saved), mode))
    assert seen.shape == wanted.shape
    assert np.abs(seen.astype(int) - wanted.astype(int)).max() <= 1
    drawn = 255 * read_image(path).permute(1, 2, 0).numpy()
    if max(drawn.shape[:2]) == max(seen.shape[:2]):
        assert np.abs(drawn - seen).max() <= 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_image_of_a_tree_is_read_once_and_its_class_is_right(
    data: Any, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders at any depth, unicode, hidden, empty, links back and aside; what is no image is counted."""
    caplog.clear()
    root = tmp_path_factory.mktemp('tree')
    names = st.sampled_from(['a', 'B', 'b', 'é', '²', '٣', '10', '9', ' x', '.hidden', 'a.b'])
    expected_labels: dict[str, str] = {}
    others = 0
    classes = data.draw(st.lists(names, min_size=2, max_size=4, unique=True))
    for name in classes:
        inner = data.draw(st.lists(names, max_size=2))
        folder = root.joinpath(name, *inner)
        folder.mkdir(parents=True, exist_ok=True)
        shown = not any(part.startswith('.') for part in (name, *inner))
        for file in data.draw(
            st.lists(st.sampled_from(['1.png', '2.PNG', '.3.png', 'notes.txt', 'none']), unique=True)
        ):
            path = folder / file
            if file.lower().endswith('png'):
                Image.new('RGB', (2, 2)).save(path, 'png')
            else:
                path.write_text('x')
            if shown and not file.startswith('.'):
                if path.suffix.lower() == '.png':
                    expected_labels[str(path)] = name
                else:
                    others += 1
        link = data.draw(st.sampled_from([None, '..', '.']))
        if link and not (folder / 'link').exists():
            (folder / 'link').symlink_to(link)
    files = read_folder(root)
    by_number = {number: name for name, number in files.class_to_idx.items()}
    assert {path: by_number[label] for path, label in files.samples} == expected_labels
    assert len(files.samples) == len(expected_labels)
    said = sum(
        int(word) for message in caplog.messages for word in message.split('left out: ')[1].split() if word.isdecimal()
    )
    assert said == others
    assert '.hidden' not in files.class_to_idx
