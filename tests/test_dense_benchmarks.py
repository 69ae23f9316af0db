"""The benchmarks of maps, of segmentation and detection, and of what frozen features tell."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))

import maps
import probe


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


class Few(list):
    """Samples of a fixed test set."""

    epoch = 0


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
    import dense
    from photographs import Places

    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[8:24, 8:24], mask[40:56, 30:60] = 1, 2
    places = Places(mask, torch.tensor([[8.0, 8, 24, 24], [30, 40, 60, 56]]), torch.tensor([1, 2]))
    samples = Few([(torch.zeros(3, 64, 64), places)])
    logits = torch.nn.functional.one_hot(mask.long(), dense.CLASSES).permute(2, 0, 1)[None].float()
    perfect = dense.segmented(Told([logits]), samples, 1)
    assert perfect == {'miou': 1.0, 'iou_foreground': 1.0, 'recall_small': 1.0}
    nothing = dense.segmented(Told([torch.zeros(1, dense.CLASSES, 64, 64)]), samples, 1)
    background = (mask == 0).float().mean().item()
    assert nothing == {'miou': pytest.approx(background / 3), 'iou_foreground': 0.0, 'recall_small': 0.0}

    output = {'boxes': places.boxes, 'labels': places.labels, 'scores': torch.tensor([0.9, 0.8])}
    assert dense.detected(Told([[output]]), samples, 1)['ap50'] == pytest.approx(1.0)
    moved = {**output, 'boxes': places.boxes + torch.tensor([[0.0, 0, 0, 0], [20, 0, 20, 0]])}
    assert dense.detected(Told([[moved]]), samples, 1)['ap50_small'] == pytest.approx(0.5)
    target = dense.wanted_places([Places(torch.zeros(448, 448, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0))])
    assert target.sum() == pytest.approx(dense.EVEN)
