"""Images that a CSV lists, with a label or any number of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from images import load_folder
from PIL import Image
from tiny import read_metrics

from timm_apvit.cli.main import main

TINY = '--model test_apvit --model-kwargs depth=1 --img-size 32 --num-patches 4 --batch-size 8 --epochs 2 --no-aug'
TINY += ' --threads 1 --workers 0 --device cpu --lr 3e-3'
COLOURS = {'red': (255, 0, 0), 'green': (0, 255, 0), 'blue': (0, 0, 255)}


def write(folder: Path, split: str, number: int, several: bool) -> None:
    """Write images whose quarters are of some colours, and a CSV that says which."""
    rng = np.random.default_rng(len(split))
    (folder / 'pictures').mkdir(parents=True, exist_ok=True)
    lines = ['image,labels,more']
    for n in range(number):
        image, held = Image.new('RGB', (32, 32)), []
        for place, (name, colour) in enumerate(COLOURS.items()):
            if rng.random() < 0.5 if several else n % 3 == place:
                image.paste(
                    colour, (16 * (place % 2), 16 * (place // 2), 16 * (place % 2) + 16, 16 * (place // 2) + 16)
                )
                held.append(name)
        image.save(folder / f'pictures/{split}{n}.png')
        lines.append(f'pictures/{split}{n}.png, {" | ".join(held)},x')
    (folder / f'{split}.csv').write_text('\n'.join(lines), encoding='utf-8-sig')


def written(folder: Path, several: bool, **numbers: int) -> Path:
    """A folder with so many images of each split."""
    for split, number in numbers.items():
        write(folder, split, number, several)
    return folder


@pytest.fixture(scope='module')
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp('single'), False, train=12, val=6)


@pytest.fixture(scope='module')
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp('several'), True, train=64, val=24)


def test_a_csv_says_which_image_is_of_which_class(single: Path, several: Path) -> None:
    splits = load_folder(single)
    assert splits.label_names == ('blue', 'green', 'red')
    assert [len(splits.train), len(splits.test)] == [12, 6]
    assert [splits.test[n][1] for n in range(6)] == [2, 1, 0] * 2
    assert splits.train.known_labels == [2, 1, 0] * 4
    splits = load_folder(several, multi_label=True)
    for n in range(len(splits.test)):
        image, label = splits.test[n]
        places = [(18, 6), (6, 18), (6, 6)]  # of blue, green and red; images are of 24 pixels
        assert label.tolist() == [float(image[:, y, x].max() > 0) for y, x in places]
    assert splits.train.known_labels is None


def test_labels_that_could_be_several_are_told(several: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in ('pictures', 'val.csv'):
        (tmp_path / path).symlink_to(several / path)
    lines = (several / 'val.csv').read_text(encoding='utf-8-sig').splitlines()
    for name in ('train', 'val'):
        (tmp_path / f'{name}.csv').unlink(missing_ok=True)
        (tmp_path / f'{name}.csv').write_text('\n'.join(line for line in lines if ', ,' not in line))
    load_folder(tmp_path)
    assert 'labels with | are classes of their own; --multi-label takes them apart.' in caplog.messages[0]


def test_several_labels_are_learnt_evaluated_and_predicted(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, results, predicted = tmp_path / 'run', tmp_path / 'results.json', tmp_path / 'x.csv'
    options = [*TINY.split(), '--multi-label', '--mixup', '0.1', '--output', str(run), '--twin']
    assert main(['finetune', str(several), *options]) == 0
    rows = read_metrics(run)
    assert rows[-1]['test_loss'] < rows[0]['test_loss'] < 0.69  # of chance
    assert rows[-1]['test_map'] > 0.7
    summary = json.loads((run / 'summary.json').read_text())
    assert summary['test_apvit']['best_map'] == max(row['test_map'] for row in rows)
    assert 'mAP' in capsys.readouterr().out
    quick = ['--device', 'cpu', '--batch-size', '8', '--threads', '1']
    assert main(['evaluate', str(run), *quick, '--beside', str(run / 'twin/best'), '--json', str(results)]) == 0
    model, twin = json.loads(results.read_text())['rows']
    best = max(rows, key=lambda row: row['test_map'])
    assert [model['map'], model['loss']] == pytest.approx([best['test_map'], best['test_loss']], rel=1e-4)
    for same in (run / 'best', f'local-dir:{run / "best"}'):  # which say of themselves that labels are several
        beside = ['--beside', str(run / 'twin/best'), '--json', str(results)]
        assert main(['evaluate', str(same), str(several), *quick, *beside]) == 0
        assert [row['map'] for row in json.loads(results.read_text())['rows']] == [model['map'], twin['map']]
    best = max(read_metrics(run / 'twin'), key=lambda row: row['test_map'])
    assert [twin['map'], twin['loss']] == pytest.approx([best['test_map'], best['test_loss']], rel=1e-4)
    images = [str(several / f'pictures/val{n}.png') for n in range(3)]
    words = ['predict', *images, '--model', str(run), '--multi-label', '--top-k', '3', '--csv', str(predicted)]
    assert main([*words, '--device', 'cpu']) == 0
    assert len(predicted.read_text().splitlines()) == 4
    before = predicted.read_text()
    words.remove('--multi-label')  # which the run says, and each model that it saved
    for model in (run, run / 'best', f'local-dir:{run / "best"}'):
        words[words.index('--model') + 1] = str(model)
        assert main([*words, '--device', 'cpu']) == 0
        assert predicted.read_text() == before


def test_a_csv_is_read_as_csv_is(single: Path, tmp_path: Path) -> None:
    for path in ('pictures', 'val.csv'):
        (tmp_path / path).symlink_to(single / path)
    lines = ['image,label', '', *(f'"pictures/train{n}.png","{name}"' for n, name in enumerate(COLOURS)), '', '']
    (tmp_path / 'train.csv').write_text('\r\n'.join(lines))
    assert load_folder(tmp_path).train.known_labels == [2, 1, 0]


@pytest.mark.parametrize(
    ('text', 'options', 'message'),
    [
        ('image,label\npictures/train0.png\n', '', r'path of an image and its label in line 2 of .*train\.csv'),
        ('image,label\nnone.png,red\n', '', r"images that exist in .*train\.csv, got '.*none\.png' in line 2"),
        ('pictures/train0.png,red\n', '', r"a header in line 1 of .*train\.csv, such as image,label, got \['pict"),
        ('image,label\n', '', r"images with their classes in '.*train\.csv', got no images"),
        ('image,label\npictures/train0.png,red\n', '', "at least 2 classes in .*, got those of 'red' only"),
        (b'\xff\xfe\x00', '', r'a CSV in UTF-8, got another file in .*train\.csv'),
        (None, '--multi-label --teacher test_vit', 'expected --teacher without --multi-label'),
        (None, '--multi-label --class-weights balanced', 'expected images that have one label each'),
        (None, '--multi-label --monitor test_top1', 'a --monitor that is measured, test_loss or the default'),
    ],
)
def test_rejects_by_line_what_a_csv_cannot_say(
    text: str | bytes | None, options: str, message: str, single: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for path in ('pictures', 'train.csv', 'val.csv'):
        (tmp_path / path).symlink_to(single / path)
    if text is not None:
        (tmp_path / 'train.csv').unlink()
        (tmp_path / 'train.csv').write_bytes(text.encode() if isinstance(text, str) else text)
    words = ['finetune', str(tmp_path), *TINY.split(), *options.split(), '--output', str(tmp_path / 'run')]
    assert re.search(message, refused(lambda *given: main(list(given)), words, capsys))


def test_rejects_several_labels_in_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('train/a', 'val/a'):
        (tmp_path / name).mkdir(parents=True)
    words = ['finetune', str(tmp_path), *TINY.split(), '--multi-label']
    error = refused(lambda *given: main(list(given)), words, capsys)
    assert 'expected CSV files with --multi-label, in which an image has its labels, got' in error
