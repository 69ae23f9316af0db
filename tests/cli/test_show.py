"""The command that draws: what it writes, and what it says of bad input."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import create, refused
from PIL import Image
from safetensors.torch import save_file

from timm_apvit import save_pretrained
from timm_apvit.cli import show
from timm_apvit.cli.main import main
from timm_apvit.finetuning import models


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('model')
    save_pretrained(create(img_size=32, num_patches=4, depth=1), directory)  # type: ignore[arg-type]
    return directory


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'photograph.jpg')
    return tmp_path / 'photograph.jpg'


def shows(*arguments: Any) -> int:
    return main(['show', *map(str, arguments), '--device', 'cpu'])


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_picture_and_animation_are_written_and_named(
    saved: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, film = tmp_path / 'x.png', tmp_path / 'x.GIF'
    assert shows(photograph, '--checkpoint', saved, '-o', picture, '--animate', film) == 0
    assert capsys.readouterr().out == f'{picture}\n{film}\n'
    with Image.open(picture) as image:
        assert image.format == 'PNG'
        assert image.width > 4 * image.height / 2
    with Image.open(film) as gif:
        assert gif.format == 'GIF'
        assert gif.n_frames == 3
    assert left_in(tmp_path) == {'photograph.jpg', 'x.png', 'x.GIF'}


@pytest.mark.slow
def test_run_with_snapshots_is_animated_over_its_training(photograph: Path, tmp_path: Path) -> None:
    run, film = tmp_path / 'run', tmp_path / 'x.gif'
    trained = ['--img-size', '32', '--num-patches', '4', '--samples', '8', '--test-samples', '4', '--batch-size', '4']
    options = [*trained, '--epochs', '4', '--threads', '1', '--device', 'cpu', '--no-twin', '--output', str(run)]
    assert main(['finetune', *options, '--snapshots', '--model', 'test_apvit']) == 0
    kept = sorted(path.name for path in (run / 'checkpoints').iterdir())
    assert kept == [f'epoch-{n:04d}' for n in range(1, 5)]
    resumable = {path.parent.name for path in run.glob('checkpoints/*/training.pt')}
    assert resumable == {(run / link).readlink().name for link in ('last', 'best')}

    def frames(*more: str) -> int:
        assert shows(photograph, '--checkpoint', run, '--animate', film, *more) == 0
        with Image.open(film) as gif:
            return int(gif.n_frames)

    assert frames() == 4
    assert frames('--num-patches', '9') == 4
    assert frames('--num-patches', '1,4') == 2
    shutil.rmtree(run / 'checkpoints' / min({*kept} - resumable))
    assert frames() == 3


@pytest.mark.parametrize('ending', ['png', 'jpg', 'pdf', 'svg', 'webp'])
def test_ending_is_the_format(saved: Path, photograph: Path, tmp_path: Path, ending: str) -> None:
    assert shows(photograph, '--checkpoint', saved, '-o', tmp_path / f'x.{ending}', '--panels', 'image') == 0
    start = (tmp_path / f'x.{ending}').read_bytes()[:12]
    marks = {'png': b'PNG', 'jpg': b'\xff\xd8', 'pdf': b'%PDF', 'svg': b'<?xml', 'webp': b'WEBP'}
    assert marks[ending] in start


def test_options_reach_the_picture(
    saved: Path, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    for name in ('plot_patches', 'compare'):
        drawn = getattr(show, name)
        monkeypatch.setattr(show, name, lambda *a, n=name, f=drawn, **k: calls.append((n, a, k)) or f(*a, **k))
    options = ['--checkpoint', f'local-dir:{saved}', '-o', tmp_path / 'x.png']
    assert shows(photograph, *options, '--num-patches', '2x3', '--panels', 'sheet,coverage', '--img-size', '20') == 0
    name, (_, images, budget), style = calls.pop()
    assert (name, budget, style) == (
        'plot_patches',
        (2, 3),
        {'panels': ('sheet', 'coverage'), 'titles': ['photograph.jpg']},
    )
    assert [tuple(image.shape) for image in images] == [(3, 12, 20)]
    assert shows(photograph, photograph, *options, '--num-patches', '1,5', '--color-by', 'attention') == 0
    name, (_, images, budgets), style = calls.pop()
    assert (name, len(images), budgets, style['color_by']) == ('compare', 2, (1, 5), 'attention')


def test_checkpoint_is_a_run_or_a_folder_or_on_the_hub(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[Any] = []
    monkeypatch.setattr(models, 'create_model', lambda options, *_, **__: sources.append(options.model))
    run = tmp_path / 'run'
    (run / 'best').mkdir(parents=True)
    (run / 'config.yaml').touch()
    for name in (str(run), str(saved), f'local-dir:{saved}', 'someone/apvit-birds', 'hf-hub:a/b', 'test_apvit'):
        models.load_model(name)
    assert sources == [
        f'local-dir:{run / "best"}', f'local-dir:{saved}', f'local-dir:{saved}',
        'hf-hub:someone/apvit-birds', 'hf-hub:a/b', 'test_apvit',
        'test_apvit',  # once without its weights
    ]  # fmt: skip


def test_a_run_without_snapshots_says_what_is_animated_instead(
    saved: Path, photograph: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.yaml').write_text('model: test_apvit')
    (tmp_path / 'run/best').symlink_to(saved)
    assert shows(photograph, '--model', tmp_path / 'run', '--animate', tmp_path / 'x.gif', '--img-size', '20') == 0
    assert 'run kept no --snapshots: the animation is over numbers of patches.' in caplog.messages[0]


def test_images_of_a_folder_are_drawn(saved: Path, photograph: Path, tmp_path: Path) -> None:
    (tmp_path / 'x').mkdir()
    assert shows(tmp_path, '--model', saved, '-o', tmp_path / 'x/x.png') == 0
    with Image.open(tmp_path / 'x/x.png') as image:
        assert image.width > 1.5 * image.height


def test_names_that_no_font_has_are_drawn(saved: Path, photograph: Path, tmp_path: Path) -> None:
    for n, name in enumerate(('鳥の写真.jpg', '$x_{.jpg', 'a\nb.jpg', os.fsdecode(b'\xff.jpg'), 'n' * 200 + '.jpg')):
        file = photograph.with_name(name)
        file.write_bytes(photograph.read_bytes())
        assert shows(file, '--checkpoint', saved, '-o', tmp_path / f'{n}.png', '--panels', 'image') == 0


@pytest.mark.parametrize('size', [(1, 1), (1, 700), (700, 1)])
def test_tiny_and_thin_images_are_drawn(saved: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new('L', size, 100).save(tmp_path / 'x.tif')
    panels = 'image,fixed,adaptive,outlines,sheet,coverage'
    assert shows(tmp_path / 'x.tif', '--checkpoint', saved, '-o', tmp_path / 'x.png', '--panels', panels) == 0
    with Image.open(tmp_path / 'x.png') as image:
        assert max(image.size) < 6000


def test_rejects_bad_images(saved: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'cut.jpg').write_bytes(photograph.read_bytes()[:900])
    before = left_in(tmp_path)
    for name, message in (
        ('text.jpg', 'which cannot be read: Pillow does not know its format'),
        ('cut.jpg', 'which cannot be read: '),
        ('none.jpg', 'which does not exist'),
    ):
        error = refused(shows, [photograph, tmp_path / name, '--checkpoint', saved, '-o', tmp_path / 'x.png'], capsys)
        assert 'expected an image file, got ' in error
        assert message in error
    assert left_in(tmp_path) == before


def test_rejects_bad_outputs(saved: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'folder.png').mkdir()
    before = left_in(tmp_path)
    for outputs, message in (
        (['-o', tmp_path / 'x.xyz'], r'expected --output to end in .'),
        (['-o', tmp_path / 'x'], 'expected --output to end in .'),
        (['-o', tmp_path / 'none/x.png'], 'in a folder that exists'),
        (['-o', tmp_path / 'folder.png'], 'in a folder that exists'),
        (['-o', photograph], 'another file than the images'),
        (['-o', '/proc/x.png'], 'expected a file in a folder that can be written to'),
        (['--animate', tmp_path / 'x.gif', '--num-patches', '4'], 'expected several numbers of patches to animate'),
        (['--animate', tmp_path / 'x.png'], 'expected --animate to end in .gif'),
        (
            ['-o', tmp_path / 'x.gif', '--animate', tmp_path / 'x.gif'],
            'expected --output and --animate to be two files',
        ),
        ([], 'expected --output FILE, --animate FILE.gif or both, got neither'),
    ):
        assert message in refused(shows, [photograph, '--checkpoint', saved, *outputs], capsys)
    assert left_in(tmp_path) == before


def test_rejects_outputs_that_are_another_file_by_another_path(
    saved: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / 'twin.jpg').hardlink_to(photograph)
    before = photograph.read_bytes()
    for output in (tmp_path / 'folder/../photograph.jpg', tmp_path / 'link/photograph.jpg', tmp_path / 'twin.jpg'):
        error = refused(shows, [photograph, '--checkpoint', saved, '-o', output], capsys)
        assert 'another file than the images' in error
    for film in (tmp_path / 'folder/../x.gif', tmp_path / 'link/x.gif'):
        error = refused(shows, [photograph, '--checkpoint', saved, '-o', tmp_path / 'x.gif', '--animate', film], capsys)
        assert 'to be two files' in error
    assert photograph.read_bytes() == before
    assert left_in(tmp_path) == {'folder', 'link', 'photograph.jpg', 'twin.jpg'}


def test_failed_write_leaves_what_was_there(
    saved: Path, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'x.png').write_text('the picture before')

    def full(path: Path, data: bytes) -> int:
        with path.open('wb') as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    assert shows(photograph, '--checkpoint', saved, '-o', tmp_path / 'x.png') == 1
    assert capsys.readouterr().err == 'error: the disk is full: [Errno 28] No space left on device; free some space\n'
    assert (tmp_path / 'x.png').read_text() == 'the picture before'
    assert left_in(tmp_path) == {'photograph.jpg', 'x.png'}


def test_rejects_bad_checkpoints(
    saved: Path, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = tmp_path / 'vit'
    timm.models.save_for_hf(timm.create_model('test_vit'), vit, safe_serialization=True)
    broken = tmp_path / 'broken'
    broken.mkdir()
    (broken / 'config.json').write_text((saved / 'config.json').read_text())
    save_file({'nothing': torch.zeros(1)}, broken / 'model.safetensors')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.yaml').touch()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for checkpoint, message in (
        (vit, "expected an APViT, got 'local-dir:"),
        ('test_vit', "expected an APViT, got 'test_vit', which is a ViT; its twin is test_apvit"),
        ('resnet18', "expected an APViT, got 'resnet18', which is a ResNet"),
        (broken, 'cannot create local-dir:'),
        (tmp_path / 'run', 'expected a run with a saved model, got '),
        (tmp_path, 'which holds neither config.yaml nor config.json'),
        (photograph, 'a file'),
        ('no_such_model', 'expected a registered model'),
        ('local-dir:/no/such', 'expected a folder with a model'),
        ('/no/such/folder', 'expected the folder of a run or of a saved model, got '),
        ('no/such/folder', "'no/such/folder', which does not exist"),
        ('runs/frist', "got 'runs/frist', no folder: cannot create hf-hub:runs/frist"),
        ('', "got '', which holds neither"),
    ):
        error = refused(shows, [photograph, '--checkpoint', checkpoint, '-o', tmp_path / 'x.png'], capsys)
        assert message in error
    assert not (tmp_path / 'x.png').exists()


def test_rejects_bad_options(saved: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [photograph, '--checkpoint', saved, '-o', tmp_path / 'x.png']
    for options, message in (
        (['--num-patches', '0'], 'expected N or GHxGW'),
        (['--panels', 'image,x'], 'expected panels among image, fixed'),
        (['--color-by', 'x'], 'invalid choice'),
        (['--img-size', '0'], 'expected an integer >= 1'),
    ):
        assert message in refused(shows, [*good, *options], capsys)
    assert 'the following arguments are required: IMAGE' in refused(shows, good[1:], capsys)
    assert main(['show', *map(str, good), '--device', 'nothing']) == 2
    assert 'expected a device that is there' in capsys.readouterr().err
