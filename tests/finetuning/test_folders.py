"""Folders of images, sound and unsound."""

from pathlib import Path

import numpy as np
import pytest
import torch
from images import CONFIG, load_folder, write_images
from PIL import Image

from timm_apvit.finetuning.image_files import find_test


def test_folder_numbers_classes_alike_in_both_splits(folder: Path) -> None:
    for image in (folder / 'val/cat').iterdir():
        image.unlink()
    splits = load_folder(folder)
    assert splits.label_names == ('cat', 'dog')
    assert {label for _, label in (splits.test[n] for n in range(len(splits.test)))} == {1}
    assert [len(splits.train), len(splits.test)] == [6, 3]


@pytest.mark.parametrize('name', ['validation', 'test'])
def test_folder_splits_go_by_several_names(name: str, folder: Path) -> None:
    (folder / 'val').rename(folder / name)
    assert len(load_folder(folder).test) == 3 + 3


def test_rejects_folders_without_the_images_they_should_hold(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / 'empty'
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"'.*missing', which is not a folder"):
        load_folder(tmp_path / 'missing')
    with pytest.raises(
        FileNotFoundError, match=r'a folder named train or training, or a CSV of such a name, in .*, got nothing'
    ):
        load_folder(empty)
    with pytest.raises(FileNotFoundError, match=r'a folder named train or training, .* got cat/, dog/'):
        load_folder(folder / 'train')
    (empty / 'train/cat').mkdir(parents=True)
    (empty / 'val').mkdir()
    with pytest.raises(ValueError, match=r'expected images with their classes in .* got no images'):
        load_folder(empty)
    write_images(empty / 'train/dog', 2)
    with pytest.raises(ValueError, match=r"at least 2 classes in .*, got those of 'dog' only"):
        load_folder(empty)
    write_images(folder / 'val/bird', 2)
    with pytest.raises(ValueError, match=r'expected classes among .* in .*val.*, got bird'):
        load_folder(folder)


@pytest.mark.parametrize('damage', ['garbage', 'empty'])
def test_rejects_what_is_no_image_by_name(damage: str, folder: Path) -> None:
    (folder / 'train/dog/1.jpg').write_bytes({'garbage': b'no image', 'empty': b''}[damage])
    with pytest.raises(ValueError, match=r"expected an image file, got '.*dog/1\.jpg', which cannot be read"):
        load_folder(folder)
    (folder / 'val/dog/0.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match=r'and 1 more'):
        load_folder(folder)


def test_an_image_that_is_cut_off_is_named_when_it_is_read(folder: Path) -> None:
    broken = folder / 'train/dog/1.jpg'
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    splits = load_folder(folder)
    with pytest.raises(ValueError, match=r"expected an image file, got '.*dog/1\.jpg', which cannot be read: .*trunc"):
        [splits.train[n] for n in range(len(splits.train))]


def test_rejects_channels_that_image_files_do_not_have(folder: Path) -> None:
    with pytest.raises(ValueError, match='in_chans of 1 or 3 for image files, got 5'):
        load_folder(folder, config={**CONFIG, 'input_size': (5, 24, 24)})
    grey = load_folder(folder, config={**CONFIG, 'input_size': (1, 24, 24), 'mean': (0.5,), 'std': (0.5,)})
    assert grey.train[0][0].shape == (1, 24, 24)


def test_a_class_is_the_folder_right_below_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        for name in ('a/1.png', 'a/more/2.webp', 'a/.cache/3.png', 'b/inner/4.bmp', 'b/._5.png', '.hidden/6.png'):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(path)
    splits = load_folder(tmp_path)
    assert splits.label_names == ('a', 'b')
    assert len(splits.train) == len(splits.test) == 3


def test_what_pillow_reads_is_an_image_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ('train', 'val'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            for ending in ('gif', 'jfif', 'jpe', 'tif', 'TGA', 'webp'):
                kind = {'jfif': 'jpeg', 'jpe': 'jpeg', 'tif': 'tiff'}.get(ending, ending)
                Image.new('RGB', (8, 8)).save(tmp_path / split / name / f'1.{ending}', kind)
    (tmp_path / 'train/a/notes.txt').write_text('none')
    (tmp_path / 'train/a/raw.CR9').write_text('none')
    splits = load_folder(tmp_path)
    assert [len(splits.train), len(splits.test)] == [12, 12]
    assert caplog.messages == [
        f'{tmp_path / "train"}: files that Pillow does not read are left out: 1 of .txt, 1 of .cr9.'
    ]
    (tmp_path / 'val/b').rename(tmp_path / 'b')
    caplog.clear()
    load_folder(tmp_path)
    assert f'{tmp_path / "val"} has no images of b, which are not tested.' in caplog.messages


def test_links_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        for name in 'ab':
            (tmp_path / split / name / 'inner').mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / split / name / 'inner/1.png')
        (tmp_path / split / 'a/inner/back').symlink_to('..')
        (tmp_path / split / 'b/aside').symlink_to('inner')
    (tmp_path / 'elsewhere').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'elsewhere/2.png')
    (tmp_path / 'train/c').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'val/c').symlink_to(tmp_path / 'elsewhere')
    splits = load_folder(tmp_path)
    assert splits.label_names == ('a', 'b', 'c')
    assert [len(splits.train), len(splits.test)] == [3, 3]


def test_classes_are_numbered_alike_on_every_disk(tmp_path: Path) -> None:
    names = ['img10', 'img9', '²', 'B', 'b', 'a', '٣', 'img09']
    for order in (names, names[::-1]):
        for split in ('train', 'val'):
            for name in order:
                (tmp_path / order[0] / split / name).mkdir(parents=True)
                Image.new('RGB', (8, 8)).save(tmp_path / order[0] / split / name / '1.png')
    numbered = [load_folder(tmp_path / each).label_names for each in (names[0], names[-1])]
    assert numbered[0] == numbered[1]
    assert numbered[0].index('img9') < numbered[0].index('img10')


def test_images_of_16_bits_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for split in ('train', 'val'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(ramp).save(tmp_path / split / name / '1.png')
    image, _ = load_folder(tmp_path).test[0]
    middle = (torch.tensor([0.5]) - torch.tensor(CONFIG['mean'])) / torch.tensor(CONFIG['std'])
    assert (image.mean(dim=(1, 2)) - middle).abs().max() < 0.1


def test_class_map_numbers_the_classes_and_may_name_more(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / 'names.txt'
    names.write_text('dog\nbird\ncat\n')
    splits = load_folder(folder, class_map=str(names))
    assert splits.label_names == ('dog', 'bird', 'cat')
    assert {splits.test[n][1] for n in range(len(splits.test))} == {0, 2}
    names.write_text('dog\nbird\n')
    with pytest.raises(ValueError, match=r'expected classes among .* in .*train.*, got cat'):
        load_folder(folder, class_map=str(names))
    names.write_bytes('dog\nbird\ncat\n'.encode('utf-8-sig'))
    assert load_folder(folder, class_map=str(names)).label_names == ('dog', 'bird', 'cat')
    names.write_bytes('dog\nbird\ncat\n'.encode('utf-16'))
    with pytest.raises(ValueError, match=r'names of classes in UTF-8, got another encoding in .*names\.txt'):
        load_folder(folder, class_map=str(names))
    names.write_text('dog\ndog\n')
    with pytest.raises(ValueError, match=r'2 or more names of classes in .*all different'):
        load_folder(folder, class_map=str(names))
    with pytest.raises(FileNotFoundError, match=r'a file of names of classes, got .*missing\.txt'):
        load_folder(folder, class_map='missing.txt')


def test_test_images_are_found_with_and_without_training_images(folder: Path) -> None:
    for image in (folder / 'val/cat').iterdir():
        image.unlink()
    (folder / 'val/cat').rmdir()
    whole, split = find_test(folder), find_test(folder / 'val')
    assert [label for _, label in whole.samples] == [1, 1, 1]  # of cat and dog
    assert [label for _, label in split.samples] == [0, 0, 0]  # of dog alone
    named = find_test(folder / 'val', {'cat': 0, 'dog': 1})
    assert named.samples == whole.samples


def test_augmentation_is_what_the_options_say(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    for name in ('train/a', 'train/b', 'val/a'):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / '0.png')
    still = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'color_jitter': 0.0, 'hflip': 0.0}

    def images(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
        splits = load_folder(tmp_path, **options)
        return splits.train[0][0], splits.test[0][0]

    expected = images()[1]
    assert torch.equal(images(**still)[0], expected)
    assert torch.equal(images(no_aug=True)[0], expected)
    assert torch.equal(images(**{**still, 'hflip': 1.0})[0], expected.flip(2))
    assert torch.equal(images(**still, vflip=1.0)[0], expected.flip(1))
    erased = images(**still, reprob=1.0)[0]
    assert 0 < (erased != expected).sum() == (erased[erased != expected] == 0).sum()
    for change in ({'color_jitter': 0.5}, {'aa': 'rand-m9-n8'}, {'scale': (0.1, 0.2)}):
        assert not torch.equal(images(**{**still, **change})[0], expected)
    small = {'scale': (0.2, 0.2), 'ratio': (1.0, 1.0), 'color_jitter': 0.0}
    nearest, bicubic = (images(**small, train_interpolation=name)[0] for name in ('nearest', 'bicubic'))
    assert not torch.equal(nearest, bicubic)
    assert not torch.equal(images(**{**small, 'ratio': (3.0, 3.0)})[0], images(**small)[0])
    train, test = images(**still, config={**CONFIG, 'crop_pct': 0.5})
    assert torch.equal(train, expected)
    assert not torch.equal(test, expected)


@pytest.mark.parametrize('size', [(1, 20_000), (20_000, 1)])
def test_an_image_that_is_all_length_takes_no_memory(size: tuple[int, int], folder: Path) -> None:
    Image.new('RGB', size, 'red').save(folder / 'val/cat/9.png')
    splits = load_folder(folder, config={**CONFIG, 'input_size': (3, 224, 224)})
    seen: list[tuple[int, int]] = []
    transform = splits.test.dataset.transform
    splits.test.dataset.transform = lambda image: seen.append(image.size) or transform(image)
    image, _ = splits.test[3]
    assert image.shape == (3, 224, 224)
    assert sorted(seen[0]) == [1, 64]
