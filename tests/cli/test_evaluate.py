"""The evaluation command: what it measures, of which model, on which data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import create
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from timm_apvit.cli.evaluate import load_evaluated, measure
from timm_apvit.cli.main import main
from timm_apvit.finetuning import evaluation
from timm_apvit.finetuning.baseline import create_baseline, save_baseline
from timm_apvit.finetuning.evaluation import images_per_second, multiply_adds
from timm_apvit.hub.saving import save_pretrained

TINY = '--model test_apvit --img-size 32 --num-patches 2,4 --samples 32 --test-samples 24 --batch-size 16 --epochs 1'
TINY += ' --model-kwargs depth=2 --threads 1 --device cpu --no-twin --seed 3'


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, 'SECONDS', 0.01)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('runs') / 'run'
    assert main(['finetune', *TINY.split(), '--output', str(directory)]) == 0
    return directory


def saved(directory: Path, names: list[str] | None, num_classes: int = 2, num_patches: Any = 2) -> str:
    model = create(img_size=32, num_patches=num_patches, num_classes=num_classes)
    nn.init.normal_(model.head.weight)
    save_pretrained(model, directory, label_names=names)
    return f'local-dir:{directory}'


def test_run_is_evaluated_on_its_own_data_as_in_its_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / 'results.json'
    assert main(['evaluate', str(run), '--device', 'cpu', '--batch-size', '5', '--json', str(file)]) == 0
    report = json.loads(file.read_text())
    metrics = json.loads((run / 'metrics.jsonl').read_text())
    assert [row['budget'] for row in report['rows']] == ['2', '4']
    for row in report['rows']:
        assert row['images'] == 24
        assert row['top1'] == pytest.approx(metrics[f'test_top1_{row["budget"]}'])
        assert row['loss'] == pytest.approx(metrics[f'test_loss_{row["budget"]}'], rel=1e-5)
        assert row['top1'] <= row['top5'] <= 1
        assert row['images_per_second'].keys() == {'1', '5'}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ['patches', 'top-1', 'top-5']
    assert [line.split()[0] for line in printed[1:3]] == ['2', '4']
    assert printed[1].split()[1] == f'{report["rows"][0]["top1"]:.3f}'
    assert printed[3].startswith('24 images; multiply-adds: of matrix products')


def test_budgets_and_sizes_that_were_not_trained_are_evaluated(run: Path, tmp_path: Path) -> None:
    file = tmp_path / 'results.json'
    command = ['evaluate', str(run), '--num-patches', '1,2x3,7', '--img-size', '48', '--device', 'cpu']
    assert main([*command, '--batch-size', '1', '--amp', 'bfloat16', '--json', str(file)]) == 0
    rows = json.loads(file.read_text())['rows']
    assert [(row['budget'], row['num_patches']) for row in rows] == [('1', 1), ('2x3', 6), ('7', 7)]
    costs = [row['multiply_adds'] for row in rows]
    assert costs == sorted(costs)
    assert len(set(costs)) == 3
    assert rows[0]['images_per_second'].keys() == {'1'}


def test_accuracy_is_that_of_the_logits(folder: Path, tmp_path: Path) -> None:
    names = ['cat', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibex']
    model = saved(tmp_path / 'model', names, num_classes=7)
    subject = load_evaluated({'model': model, 'data': str(folder), 'device': 'cpu'})
    row, confusion = measure(subject, 3, counted=True, batch_size=4)
    assert confusion is not None
    images, labels = subject.splits.test.some(6)
    reference = timm.create_model(model, pretrained=True).eval()
    reference.set_num_patches(3)
    with torch.no_grad():
        logits = reference(images)
    order = logits.argsort(1, descending=True)
    right = order == labels[:, None]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert row['top1'] == pytest.approx(right[:, 0].float().mean())
    assert confusion.sum(dim=1).tolist() == [3, 3, 0, 0, 0, 0, 0]
    assert confusion.diagonal().sum() == right[:, 0].sum()
    assert row['top5'] == pytest.approx(right[:, :5].any(1).float().mean())
    assert row['loss'] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_model_keeps_the_grid_that_it_was_made_with(folder: Path, tmp_path: Path) -> None:
    names = ['cat', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibex']
    model = saved(tmp_path / 'model', names, num_classes=7, num_patches=(1, 4))
    assert load_evaluated({'model': model, 'data': str(folder), 'device': 'cpu'}).budgets == ((1, 4),)


def test_models_are_set_side_by_side_and_classes_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / 'model', ['cat', 'dog'])
    vit = create_baseline(create(img_size=64, num_patches=4, num_classes=2))
    save_baseline(vit, tmp_path / 'vit', ['cat', 'dog'])
    beside = ['--beside', f'local-dir:{tmp_path / "vit"}', '--json', str(tmp_path / 'x.json')]
    apart = ['--per-class', str(tmp_path / 'classes.csv'), '--confusion', str(tmp_path / 'confusion.csv')]
    assert main(['evaluate', model, str(folder), '--device', 'cpu', *beside, *apart]) == 0
    rows = json.loads((tmp_path / 'x.json').read_text())['rows']
    assert [(row['model'], row['num_patches']) for row in rows] == [(model, 2), (f'local-dir:{tmp_path / "vit"}', 4)]
    assert not any('top5' in row for row in rows)
    assert capsys.readouterr().out.splitlines()[0].split()[:4] == ['model', 'patches', 'top-1', 'loss']
    classes = [line.split(',') for line in (tmp_path / 'classes.csv').read_text().splitlines()]
    assert [line[:2] for line in classes] == [['class', 'images'], ['cat', '3'], ['dog', '3']]
    assert sum(float(line[2]) for line in classes[1:]) / 2 == pytest.approx(rows[0]['top1'], abs=1e-3)
    counts = [line.split(',') for line in (tmp_path / 'confusion.csv').read_text().splitlines()]
    assert counts[0] == ['class', 'cat', 'dog']
    assert [sum(map(int, line[1:])) for line in counts[1:]] == [3, 3]
    assert main(['evaluate', model, str(folder), '--device', 'cpu', '--confusion', str(tmp_path / 'c.png')]) == 0
    with Image.open(tmp_path / 'c.png') as picture:
        assert np.asarray(picture.convert('L')).std() > 0


def test_weights_that_are_not_finite_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create(img_size=32, num_classes=2, num_patches=2)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float('nan')
    save_pretrained(model, tmp_path / 'model')
    assert main(['evaluate', f'local-dir:{tmp_path / "model"}', str(folder), '--device', 'cpu']) == 2
    assert 'expected finite weights, got others in blocks.0.mlp.fc1.weight' in capsys.readouterr().err


def test_multiply_adds_are_those_of_the_products() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(8 * 4, 5))
    assert multiply_adds(layer, torch.randn(1, 3, 8, 8)) == 4 * 8 * 3 * 16 + 8 * 4 * 5

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert multiply_adds(Attention(), torch.randn(1, 2, 6, 4)) == 2 * 2 * 6 * 6 * 4


def test_speed_is_images_by_seconds() -> None:
    torch.set_num_threads(1)
    waits: list[Any] = []

    def forward() -> None:
        waits.append(None)
        torch.ones(200, 200) @ torch.ones(200, 200)

    one, four = (images_per_second(forward, images, seconds=0.05) for images in (1, 4))
    assert len(waits) > 2
    assert 1.5 < four / one < 10


def test_registered_model_takes_weights_with_their_own_classes(folder: Path, tmp_path: Path) -> None:
    vit = timm.create_model('test_vit', num_classes=2)
    nn.init.normal_(vit.head.weight)
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    given = {'model': 'test_apvit', 'checkpoint': str(tmp_path / 'vit.safetensors'), 'data': str(folder / 'val')}
    subject = load_evaluated({**given, 'device': 'cpu'})
    assert torch.equal(subject.model.head.weight, vit.head.weight)
    assert subject.budgets == (subject.model.num_patches,)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('{}/none {}/images', 'expected the folder of a run or of a saved model, got'),
        ('local-dir:{}/none {}/images', 'expected a folder with a model, got '),
        ('local-dir:{}/model', "expected DATA, or a run's folder"),
        ('{} {}/images', 'which holds neither config.yaml nor config.json'),
        ('local-dir:{}/model {}/none', 'which is not a folder'),
        ('local-dir:{}/other {}/images', 'expected data of 3 classes, as the model has, got 2: cat, dog'),
        (
            'local-dir:{}/model {}/images --class-map {}/turned.txt',
            'order of the model, cat, dog, got dog, cat; --class-map',
        ),
        ('local-dir:{}/model {}/images --checkpoint {}/x', 'which has weights of its own'),
        ('test_apvit {}/images --checkpoint {}/headless.safetensors', 'weights with a classifier'),
        ('local-dir:{}/model {}/images --device toaster', "got 'toaster'"),
        ('local-dir:{}/model {}/images --amp float16', 'needs a CUDA GPU'),
        ('local-dir:{}/model {}/images --json {}/no/x.json', 'expected a file in a folder that exists'),
        ('local-dir:{}/model {}/images --json {}', 'expected a file in a folder that exists'),
        ('local-dir:{}/birds {}/images', "expected classes among owl, tit in '"),
        ('local-dir:{}/model {}/images --num-patches 0', "got '0'"),
        ('local-dir:{}/model {}/images --epochs 3', '--epochs'),
    ],
)
def test_rejects_what_cannot_be_evaluated(
    arguments: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / 'model', ['cat', 'dog'])
    saved(tmp_path / 'other', None, num_classes=3)
    saved(tmp_path / 'birds', ['owl', 'tit'])
    (tmp_path / 'turned.txt').write_text('dog\ncat\n')
    headless = timm.create_model('test_vit', num_classes=0)
    save_file(headless.state_dict(), tmp_path / 'headless.safetensors')
    try:
        status = main(['evaluate', '--device', 'cpu', *arguments.replace('{}', str(tmp_path)).split()])
    except SystemExit as error:
        status = int(str(error.code))
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.count('\n') == 1


def test_run_without_a_checkpoint_has_nothing_to_evaluate(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'config.yaml').write_text((run / 'config.yaml').read_text())
    assert main(['evaluate', str(tmp_path), '--device', 'cpu']) == 2
    assert 'expected a run with a saved model, got ' in capsys.readouterr().err


def test_run_on_a_folder_is_evaluated_with_its_own_crop(folder: Path, tmp_path: Path) -> None:
    output, file = tmp_path / 'run', tmp_path / 'results.json'
    tiny = '--model test_apvit --img-size 32 --epochs 1 --batch-size 2 --workers 0 --device cpu --crop-pct 0.5'
    assert main(['finetune', str(folder), *tiny.split(), '--no-twin', '--output', str(output)]) == 0
    assert json.loads((output / 'best/config.json').read_text())['pretrained_cfg']['crop_pct'] == 0.5
    expected = json.loads((output / 'metrics.jsonl').read_text())['test_loss']
    losses = []
    for command in ([str(output)], [str(output / 'best'), str(folder)], [str(output), '--crop-pct', '1']):
        assert main(['evaluate', *command, '--device', 'cpu', '--json', str(file)]) == 0
        losses.append(json.loads(file.read_text())['rows'][0]['loss'])
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[1] == pytest.approx(expected, rel=1e-5)
    assert losses[2] != pytest.approx(expected, rel=1e-5)
