"""The benchmarks of maps, of segmentation and detection, and of what frozen features tell."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))

import growth
import maps
import probe

from timm_apvit.learning.saliency import fit_saliency


def test_a_probe_reads_what_features_tell():
    labels = torch.arange(60) % 3
    told = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(60, 3)
    assert probe.probe((told, labels), (told[:30], labels[:30]), 3)['top1'] == 1.0
    silent = torch.randn(60, 3)
    assert probe.probe((silent, labels), (torch.randn(300, 3), torch.arange(300) % 3), 3)['top1'] < 0.6


def test_maps_are_timed_beside_their_tokens(monkeypatch):
    monkeypatch.setattr(maps, 'PATCHES', 16)
    found = maps.measure(64, 1)
    assert 16 <= found['pairs'] <= found['all_pairs'] == 16 * 16
    assert found['share'] == pytest.approx(found['maps_ms'] / found['tokens_ms'], abs=0.01)


class Told(torch.nn.Module):
    """Answers of a model by heart, one batch after the other."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images):
        return next(self.answers)


def test_dense_tasks_are_scored():
    for library in ('pycocotools', 'segmentation_models_pytorch', 'torchvision'):
        pytest.importorskip(library)
    import dense_scores
    import dense_tasks
    from photographs import Places

    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[8:24, 8:24], mask[40:56, 30:60] = 1, 2
    places = Places(mask, torch.tensor([[8.0, 8, 24, 24], [30, 40, 60, 56]]), torch.tensor([1, 2]))
    test = [(torch.zeros(1, 3, 64, 64), [places])]
    small = 0.02 * 448**2
    logits = torch.nn.functional.one_hot(mask.long(), 16).permute(2, 0, 1)[None].float()
    perfect = dense_scores.segmented(Told([logits]), test, 16, small)
    assert perfect == {'miou': 1.0, 'iou_foreground': 1.0, 'recall_small': 1.0}
    nothing = dense_scores.segmented(Told([torch.zeros(1, 16, 64, 64)]), test, 16, small)
    background = (mask == 0).float().mean().item()
    assert nothing == {'miou': pytest.approx(background / 3), 'iou_foreground': 0.0, 'recall_small': 0.0}

    output = {'boxes': places.boxes, 'labels': places.labels, 'scores': torch.tensor([0.9, 0.8])}
    assert dense_scores.detected(Told([[output]]), test, 16, small)['ap50'] == pytest.approx(1.0)
    moved = {**output, 'boxes': places.boxes + torch.tensor([[0.0, 0, 0, 0], [20, 0, 20, 0]])}
    assert dense_scores.detected(Told([[moved]]), test, 16, small)['ap50_small'] == pytest.approx(0.5)
    blank = torch.zeros(448, 448, dtype=torch.uint8)
    task = dense_tasks.TASKS['segmentation']
    target = dense_tasks.wanted_places(task, [Places(blank, torch.zeros(0, 4), torch.zeros(0))])
    assert target.sum() == pytest.approx(dense_tasks.EVEN)
    two = blank.clone()
    two[:32, :32], two[64:128, 64:128] = 1, 2
    there = [Places(two, torch.tensor([[0.0, 0, 32, 32], [64, 64, 128, 128]]), torch.tensor([1, 2]))]
    for power, ratio in ((0.0, 1), (0.5, 2), (1.0, 4)):
        target = dense_tasks.wanted_places(task._replace(area_power=power), there)
        assert target.sum() == pytest.approx(1)
        even = dense_tasks.EVEN / 784
        assert (target[0, 4:8, 4:8] - even).sum() == pytest.approx(ratio * (target[0, :2, :2] - even).sum())
    two[:32, 16:32] = 0  # of which boxes tell nothing
    assert (dense_tasks.wanted_places(dense_tasks.TASKS['detection'], there)[0, :2, :2] > 0.1).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['segmentation', 'detection'])
@pytest.mark.parametrize('contestant', ['fixed', 'moving', 'crowded'])
def test_contestants_of_dense_tasks_take_a_step(name, contestant, tmp_path, monkeypatch):
    for library in ('pycocotools', 'segmentation_models_pytorch', 'torchvision'):
        pytest.importorskip(library)
    import dense
    from photographs import Places

    weights = tmp_path / 'weights.safetensors'
    save_file(timm.create_model('test_vit').state_dict(), weights)
    monkeypatch.setattr(dense, 'NAME', 'test_apvit')
    task = dense.TASKS[name]
    overlay = {'pretrained_cfg_overlay': {'file': str(weights), 'input_size': (3, 160, 160)}}
    model, vit = dense.create(task, contestant, 16, weights, **overlay)
    mask = torch.zeros(448, 448, dtype=torch.uint8)
    mask[100:200, 50:150] = 3
    places = [Places(mask, torch.tensor([[50.0, 100, 150, 200]]), torch.tensor([3]))] * 2
    images = torch.randn(2, 3, 448, 448)
    if contestant == 'crowded':
        fit_saliency(vit, [(images, dense.wanted_places(task, places))], epochs=1)
    loss = dense.loss_of(task, model.train(), images, places, 0.2)
    loss.backward()
    assert loss.isfinite()
    assert vit.num_patches == 16
    assert dense.multiply_adds(task, model.eval()) > 0
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_where_patches_lie_is_drawn(tmp_path):
    for library in ('pycocotools', 'segmentation_models_pytorch', 'torchvision', 'matplotlib'):
        pytest.importorskip(library)
    import dense

    class Samples(list):
        mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.2)

    model = timm.create_model('test_apvit', localizer='saliency', num_patches=16)
    dense.draw(model, Samples([(torch.randn(3, 160, 160), None)] * 2), tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize('task', ['scratch', 'scratch-detection'])
def test_what_starts_from_scratch_is_trained_and_reported(task, tmp_path, monkeypatch):
    for library in ('pycocotools', 'segmentation_models_pytorch', 'torchvision'):
        pytest.importorskip(library)
    import dense
    import fashion

    objects = torch.rand(20, 28, 28).numpy(), torch.arange(20).numpy() % 10
    monkeypatch.setattr(fashion, 'load_fashion', lambda folder, train: objects)
    arguments = ['--task', task, '--tokens', '16', '--images', '64', '--test-images', '4', '--tests', '1']
    contestants = ['--contestants', 'fixed', 'moving', 'crowded', '--results', str(tmp_path)]
    monkeypatch.setattr(dense.sys, 'argv', ['dense.py', *arguments, *contestants])
    monkeypatch.setattr(dense.torch, 'set_num_threads', lambda number: None)
    dense.main()
    table = (tmp_path / f'{task}.md').read_text()
    assert table.count('| fixed | 16 | 0 |') == table.count('| moving | 16 | 0 |') == 1
    found = json.loads((tmp_path / f'{task}-moving-16-0.json').read_text())
    assert found['curve'][-1]['images'] == 64
    metrics = {'scratch': ['miou', 'iou_foreground', 'recall_small'], 'scratch-detection': ['ap50', 'ap50_small']}
    for name in metrics[task]:
        assert name in table
        assert -1 <= found['curve'][-1][name] <= 1  # COCO's -1: no such thing


def test_several_objects_lie_where_their_masks_say(monkeypatch):
    import fashion

    brightness = (torch.arange(10) + 1.0) / 10
    objects = brightness.reshape(-1, 1, 1).expand(10, 28, 28).numpy(), torch.arange(10).numpy()
    monkeypatch.setattr(fashion, 'load_fashion', lambda folder, train: objects)
    samples = fashion.load_several('train', 8, 3)
    for image, (mask, boxes, labels) in (samples[index] for index in range(8)):
        assert image.shape == (1, 224, 224)
        assert set(mask.unique().tolist()) == {0, *labels.tolist()}
        value = image[0] * 0.3 + 0.1
        for each in set(labels.tolist()):  # whose brightness it has
            torch.testing.assert_close(value[mask == each], torch.full_like(value[mask == each], each / 10))
        assert 1 <= len(boxes) == len(labels) <= 6
        for (left, top, right, bottom), label in zip(boxes.long().tolist(), labels.tolist(), strict=True):
            own = mask[top:bottom, left:right] == label
            assert all(edge.any() for edge in (own[0], own[-1], own[:, 0], own[:, -1]))


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='Peak memory is measured on Linux only.')
def test_growth_is_measured_drawn_and_has_slopes(monkeypatch, tmp_path):
    assert growth.slope([(n, 3 * n**2) for n in (1, 2, 4, 8)]) == pytest.approx(2)
    for name, value in {'NAME': 'test_apvit', 'VIT': 'test_vit', 'SOURCE': 64, 'FEW': 4, 'LARGEST': 64}.items():
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setattr(growth.subprocess, 'run', lambda *args, **kwargs: SimpleNamespace(stdout='7.5'))
    output = tmp_path / 'growth.json'
    arguments = ['--tokens', '4', '9', '--sides', '64', '96', '--rounds', '1', '--output', str(output)]
    monkeypatch.setattr(growth.sys, 'argv', ['growth.py', *arguments])
    monkeypatch.setattr(growth.torch, 'set_num_threads', lambda number: None)
    growth.main()
    found = json.loads(output.read_text())
    assert [sorted(row.keys() - {'sides', 'tokens'}) for row in found['sides']] == [
        ['apvit', 'vit', 'whole'],
        ['apvit', 'vit'],
    ]
    assert found['slopes']['tokens'].keys() == {'apvit', 'vit'}
    assert found['slopes']['sides']['vit']['mib'] == 0
    assert output.with_suffix('.png').stat().st_size > 10_000
    assert output.with_suffix('.md').read_text().count('slope') == 2
    assert growth.peak('whole', 'sides', 1024) > growth.peak('whole', 'sides', 64) + 5
