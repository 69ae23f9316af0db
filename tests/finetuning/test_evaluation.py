"""Evaluation counts every test image once, at each budget."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, tiny_splits

from timm_apvit.finetuning.baseline import create_baseline
from timm_apvit.finetuning.evaluation import evaluate, evaluate_budgets


def test_loss_and_accuracy_are_those_of_all_images() -> None:
    model, splits = tiny_model(drop_path_rate=0.5, jitter=1.0).train(), tiny_splits(7)
    samples = [splits.test[index] for index in range(len(splits.test))]
    images, labels = (torch.stack([torch.as_tensor(sample[n]) for sample in samples]) for n in range(2))
    found = evaluate(model, splits, batch_size=3)
    with torch.no_grad():
        logits = model.eval()(images)
    expected = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    assert [found['loss'], found['top1']] == pytest.approx(expected, abs=1e-6)
    assert found['images'] == 7
    assert evaluate(model, splits, batch_size=7) == pytest.approx(found, abs=1e-6)


def test_each_budget_is_evaluated_and_their_means_compared() -> None:
    model, splits = tiny_model(num_patches=2), tiny_splits(8)
    metrics = evaluate_budgets(model, splits, ((2, 2), 1, 3), batch_size=4)
    assert model.num_patches == 4
    names = ('1', '3', '2x2')
    for key in ('test_loss', 'test_top1'):
        assert metrics[key] == pytest.approx(sum(metrics[f'{key}_{name}'] for name in names) / 3)
    model.set_num_patches(3)
    found = evaluate(model, splits, 4)
    assert (found['loss'], found['top1']) == (metrics['test_loss_3'], metrics['test_top1_3'])
    assert len({metrics[f'test_loss_{name}'] for name in names}) == 3


def test_one_budget_and_the_twin_are_evaluated_as_they_are() -> None:
    model, splits = tiny_model(num_patches=3), tiny_splits(4)
    assert evaluate_budgets(model, splits, (3,), 4).keys() == {'test_loss', 'test_top1'}
    assert evaluate_budgets(create_baseline(model), splits, (1, 3), 4).keys() == {'test_loss', 'test_top1'}
