"""The prediction command: what is in images, and where the model looked."""

import csv
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import create, normalised, refused
from images import write_images
from PIL import Image

from timm_apvit import save_pretrained
from timm_apvit.cli.main import main
from timm_apvit.pictures.images import read_image


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp('model')
    model = create(img_size=32, num_patches=4, depth=1, num_classes=3, localizer={'name': 'glance', 'grid': 3})
    torch.nn.init.normal_(model.head.weight)
    for layer in (model.patch_embed.patching.localizer.classes[0], model.patch_embed.patching.localizer.score):
        torch.nn.init.normal_(layer.weight)
    save_pretrained(model, directory, label_names=['owl', 'tit', 'jay'])  # type: ignore[arg-type]
    return f'local-dir:{directory}'


def test_predictions_are_those_of_the_model(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / 'photos/inner', 3)
    Image.new('RGB', (32, 32), 'red').save(tmp_path / 'red.png')
    file = tmp_path / 'x.csv'
    paths = [str(tmp_path / 'photos'), str(tmp_path / 'red.png')]
    command = ['predict', *paths, '--checkpoint', saved, '--device', 'cpu', '--top-k', '2', '--batch-size', '3']
    assert main([*command, '--csv', str(file)]) == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [Path(row['image']).name for row in rows] == ['0.jpg', '1.jpg', '2.jpg', 'red.png']
    model = timm.create_model(saved, pretrained=True).eval()
    image = normalised(model, read_image(tmp_path / 'red.png'))
    with torch.no_grad():
        probabilities, classes = model(image).softmax(dim=1)[0].topk(2)
        window = model.patch_geometry(image).window[0]
    names = ['owl', 'tit', 'jay']
    assert [rows[3]['class1'], rows[3]['class2']] == [names[n] for n in classes]
    found = [float(rows[3][f'probability{n}']) for n in (1, 2)]
    assert found == pytest.approx(probabilities.tolist(), abs=1e-3)
    where = [float(rows[3][name]) for name in ('x', 'y', 'half_extent')]
    assert where == pytest.approx(window.tolist(), abs=1e-3)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(rows[0])
    assert len(lines) == 5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('{}/none.jpg', "expected images and folders that exist, got '.*none.jpg'"),
        ('{}/empty', 'expected images in .*empty, got none'),
        ('{}/red.png --csv {}/no/x.csv', 'expected a file in a folder that exists'),
        ('{}/red.png --top-k 0', "got '0'"),
        ('{}/red.png --device toaster', "got 'toaster'"),
    ],
)
def test_rejects_what_cannot_be_named(
    arguments: str, message: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'x.txt').write_text('x')
    Image.new('RGB', (8, 8)).save(tmp_path / 'red.png')
    words = ['predict', *arguments.replace('{}', str(tmp_path)).split(), '--checkpoint', saved]
    assert re.search(message, refused(lambda *given: main(list(given)), words, capsys))


def test_files_that_cannot_be_read_are_left_out_and_told(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / 'photos', 3)
    broken = tmp_path / 'photos/1.jpg'
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    command = ['predict', str(tmp_path / 'photos'), '--model', saved, '--device', 'cpu', '--batch-size', '1']
    assert main([*command, '--csv', str(tmp_path / 'x.csv')]) == 1
    rows = list(csv.DictReader((tmp_path / 'x.csv').read_text().splitlines()))
    assert [Path(row['image']).name for row in rows] == ['0.jpg', '2.jpg']
    error = capsys.readouterr().err
    assert "1.jpg', which cannot be read: " in error
    assert error.endswith('(1 of 3 are left out)\n')
    broken.write_text('x')
    assert main([*command, '--csv', str(tmp_path / 'x.csv')]) == 1
    assert "1.jpg', which cannot be read: Pillow does not know its format (1 of 3" in capsys.readouterr().err
    (tmp_path / 'x.csv').unlink()
    assert main(['predict', str(broken), '--model', saved, '--device', 'cpu', '--csv', str(tmp_path / 'x.csv')]) == 1
    assert capsys.readouterr().err.endswith('; nothing was predicted\n')
    assert not (tmp_path / 'x.csv').exists()
