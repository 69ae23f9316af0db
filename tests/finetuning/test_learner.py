"""One update: micro-batches, averages, budgets, jitter, precision."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from tiny import a_batch, tiny_learner, tiny_model

from timm_apvit.finetuning.learner import Learner
from timm_apvit.finetuning.objectives import WeightedCrossEntropy


def weights_after(updates: int = 3, parts: int = 1, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after some updates on one batch."""
    learner = tiny_learner(grad_accum=parts, **changes)
    images, labels = a_batch()
    micro_batches = [(images[part::parts], labels[part::parts]) for part in range(parts)]
    losses = [learner.update(micro_batches, update)['loss'].item() for update in range(updates)]
    return losses, learner.model.state_dict()


def assert_same(first: Any, second: Any, tolerance: float) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=tolerance)


def test_micro_batches_give_the_gradients_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[list[torch.Tensor]] = []

    def record(_: Any, parameters: Any, norm: float) -> None:
        gradients.append([p.grad.clone() for p in parameters])

    # Before they are clipped: clipping and AdamW would hide a wrong scale.
    monkeypatch.setattr(Accelerator, 'clip_grad_norm_', record)
    losses = [weights_after(1, parts)[0] for parts in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for whole, parts in zip(*gradients, strict=True):  # sums of float32 in another order
        assert (whole - parts).norm() <= 1e-3 * whole.norm() + 1e-6
    assert max(gradient.abs().max().item() for gradient in gradients[0]) > 0.1


def test_updates_mix_differently_and_repeat() -> None:
    losses, weights = weights_after(mixup=0.8, cutmix=1.0, smoothing=0.1)
    assert len(set(losses)) == 3
    assert losses[0] != weights_after(1, smoothing=0.1)[0][0]
    assert_same(weights_after(mixup=0.8, cutmix=1.0, smoothing=0.1), (losses, weights), 0)


def test_checkpointing_changes_memory_alone() -> None:
    assert_same(weights_after(grad_checkpointing=True), weights_after(), 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')  # while tracing
def test_compiled_blocks_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_for_tests(module: torch.nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend='aot_eager')

    monkeypatch.setattr(torch.nn.Module, 'compile', compile_for_tests)
    assert_same(weights_after(2, compile=True, ema=0.9), weights_after(2, ema=0.9), 1e-5)
    assert len(compiled) == 2


def test_bfloat16_is_used_and_weights_stay_in_float32() -> None:
    losses, weights = weights_after(amp='bfloat16')
    expected, _ = weights_after()
    assert losses != expected
    assert losses[0] == pytest.approx(expected[0], rel=0.01)
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_model_is_given_back_as_it_was() -> None:
    learner = tiny_learner(amp='bfloat16')
    learner.update([a_batch()], 0)
    assert 'forward' in vars(learner.model)
    learner.release()
    assert vars(learner.model).get('forward', learner.model.forward) == type(learner.model).forward.__get__(
        learner.model
    )


def test_average_is_timms_and_what_is_exported() -> None:
    learner = tiny_learner(ema=0.9)
    expected = ModelEmaV3(deepcopy(learner.model), decay=0.9, use_warmup=True)
    for update in range(4):
        learner.update([a_batch()], update)
        expected.update(learner.model, step=update + 1)
    tested = learner.tested_model()
    assert tested is not learner.model
    torch.testing.assert_close(tested.state_dict(), expected.module.state_dict(), rtol=0, atol=0)
    assert not torch.equal(tested.state_dict()['head.weight'], learner.model.state_dict()['head.weight'])


def test_state_holds_all_that_resumes() -> None:
    changes: dict[str, Any] = {'ema': 0.9, 'mixup': 0.8, 'num_patches': (2, 4), 'jitter': 0.2, 'jitter_epochs': 1}
    unbroken = tiny_learner(**changes)
    for update in range(2):
        unbroken.update([a_batch()], update)
    state = deepcopy(unbroken.state_dict())
    resumed = tiny_learner(**changes)
    resumed.load_state_dict(state)
    for learner in (unbroken, resumed):
        torch.rand(1)
        learner.update([a_batch()], 2)
    for name in ('model', 'ema'):
        torch.testing.assert_close(resumed.state_dict()[name], unbroken.state_dict()[name], rtol=0, atol=0)


def test_budgets_vary_by_update_and_repeat() -> None:
    def budgets(learner: Learner, updates: range) -> list[int]:
        found = []
        for update in updates:
            learner.update([a_batch(2)], update)
            found.append(learner.model.num_patches)
        return found

    first = budgets(tiny_learner(num_patches=(1, 3, (2, 2))), range(12))
    assert set(first) == {1, 3, 4}
    later = tiny_learner(num_patches=(1, 3, (2, 2)))
    assert budgets(later, range(6, 12)) == first[6:]
    assert later.tested_model().num_patches == 4
    assert set(budgets(tiny_learner(), range(3))) == {4}


def test_jitter_falls_to_nothing() -> None:
    def jitters(**changes: Any) -> list[float]:
        learner = tiny_learner(tiny_model(jitter=0.3), updates_per_epoch=2, **changes)
        patching: Any = learner.model.patch_embed.patching  # type: ignore[union-attr]
        found: list[float] = []
        patching.register_forward_hook(lambda *_: found.append(patching.jitter))
        for update in range(6):
            learner.update([a_batch(2)], update)
        assert patching.jitter == 0.3  # as the user made it, whenever it is saved
        return found

    assert jitters() == [0.3] * 6
    assert jitters(jitter=0.2) == [0.2] * 6
    assert jitters(jitter=0.2, jitter_epochs=2) == pytest.approx([0.2, 0.15, 0.1, 0.05, 0, 0])
    assert jitters(jitter=0.4, jitter_epochs=1, ema=0.9) == pytest.approx([0.4, 0.2, 0, 0, 0, 0])


def test_what_is_frozen_stays_and_then_learns() -> None:
    learner = tiny_learner(freeze_backbone_epochs=1)
    start = deepcopy(learner.model.state_dict())
    learner.update([a_batch()], 0)

    def changed(name: str) -> bool:
        return not torch.equal(start[name], learner.model.state_dict()[name])

    assert changed('head.weight')
    assert changed('patch_embed.geometry_embed.weight')
    assert not changed('blocks.0.mlp.fc1.weight')
    assert not changed('pos_embed')
    learner.begin_epoch(1)
    learner.update([a_batch()], 1)
    assert changed('blocks.0.mlp.fc1.weight')
    assert changed('pos_embed')


@pytest.mark.parametrize(('name', 'scale'), [('sgd', 0.1), ('adamw', 1.0)])
def test_optimiser_schedule_and_clipping_are_those_of_the_settings(name: str, scale: float) -> None:
    learner = tiny_learner(opt=name, sched='poly', clip_grad=0.0, lr=1e-3 * scale)
    assert type(learner.optimizer.optimizer).__name__.lower() == name
    learner.update([a_batch()], 0)
    assert learner.learning_rate == pytest.approx(1e-3 * scale)


def test_a_polynomial_schedule_falls_along_a_line() -> None:
    learner = tiny_learner(sched='poly', lr=1e-3)  # 2 epochs of 2 updates
    rates = []
    for update in range(4):
        learner.update([a_batch(2)], update)
        rates.append(learner.learning_rate)
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_class_weights_count_images_alike_in_micro_batches() -> None:
    weight, logits, labels = torch.tensor([3.0, 0.5, 0.0]), torch.randn(8, 3), torch.tensor([0, 1, 1, 1, 1, 1, 1, 0])
    criterion = WeightedCrossEntropy(weight, smoothing=0.1)
    whole = criterion(logits, labels)
    parts = [criterion(logits[n : n + 2], labels[n : n + 2]) for n in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction='none')
    unsmoothed = WeightedCrossEntropy(weight, smoothing=0.0)(logits, labels)
    torch.testing.assert_close(unsmoothed, (plain * weight[labels]).mean())
