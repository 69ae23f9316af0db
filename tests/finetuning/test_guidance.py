"""What teaches the focus where to look."""

import math

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import a_batch, tiny_learner, tiny_model, weights_of

from timm_apvit.__main__ import main
from timm_apvit.finetuning.distillation import Answer, attention_on_grid, observed
from timm_apvit.finetuning.guidance import (
    ADJUSTMENT_WEIGHT,
    FOCUS_BEGINS,
    FOCUS_COMPLETE,
    REACH,
    ROOM,
    Guide,
    adjustment_loss,
    attended_window,
    max_focus_at,
    saliency_loss,
)
from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.soundness import check_focus
from timm_apvit.finetuning.training import best_row
from timm_apvit.patching.focus import MAX_SHIFT, MAX_ZOOM, Focus
from timm_apvit.patching.layer import AdaptivePatching

WHOLE, CLOSE = [0.0, 0.0, 1.0], [0.0, 0.0, 0.4]


@torch.no_grad()
def whole_grid(side: int = 4):
    """Geometry of the full grid, without a batch's own motion: ``(2, side^2)`` patches."""
    return AdaptivePatching(8, (side, side), max_focus=2.0)(torch.rand(2, 3, 32, 32))[1]


def focus_of(saliency=None, rough=CLOSE, adjustment=(0.0, 0.0, 0.0)):
    """What two images are seen like."""
    rough, adjustment = torch.tensor([rough] * 2), torch.tensor([list(adjustment)] * 2)
    saliency = torch.zeros(2, 4, 4) if saliency is None else saliency
    return Focus(saliency, torch.zeros(2, 64), rough, adjustment, rough)


def test_attention_lies_on_the_cells_of_its_patches():
    attention = torch.rand(2, 16)
    attention = attention / attention.sum(dim=1, keepdim=True)
    assert torch.allclose(attention_on_grid(whole_grid(), attention, (4, 4)), attention, atol=1e-6)
    fine = attention_on_grid(whole_grid(), attention, (8, 8)).view(2, 4, 2, 4, 2)
    assert torch.allclose(fine.sum(dim=(2, 4)).flatten(1), attention, atol=1e-6)


def test_saliency_loss_is_the_divergence_over_images_seen_whole():
    attention = torch.softmax(torch.randn(2, 16), dim=1)
    focus, geometry = focus_of(attention.log().view(2, 4, 4)), whole_grid()
    first = torch.tensor([True, False])
    assert saliency_loss(focus, geometry, attention, first).abs() < 1e-5
    # The second image was not seen whole, and counts for nothing.
    assert saliency_loss(focus, geometry, torch.stack([attention[0], attention[0]]), first).abs() < 1e-5
    entropy = -(attention[0] * attention[0].log()).sum()
    expected = (torch.tensor(16.0).log() - entropy).item()
    assert saliency_loss(focus_of(), geometry, attention, first) == pytest.approx(expected, abs=1e-5)
    assert saliency_loss(focus_of(), geometry, attention, ~first | first) > 0
    assert saliency_loss(focus_of(), geometry, attention, first & ~first) == 0


def test_attended_window_is_the_spread_of_attention_in_the_image():
    geometry = whole_grid(8)
    # Even attention to the cells at row 2, columns 4 and 5: centre (0.25, -0.375), half-extents 0.25 and 0.125.
    even = torch.zeros(8, 8)
    even[2, 4:6] = 1 / 2
    window = attended_window(geometry, even.flatten().expand(2, -1), max_focus=5.0)
    assert torch.allclose(window[:, :2], torch.tensor([0.25, -0.375]), atol=1e-6)
    assert torch.allclose(window[:, 2], torch.tensor(ROOM * ((0.25**2 + 0.125**2) / 2) ** 0.5), atol=1e-6)
    everywhere = attended_window(geometry, torch.full((2, 64), 1 / 64), max_focus=5.0)
    assert torch.allclose(everywhere, torch.tensor(WHOLE), atol=1e-6)


def test_adjustment_loss_is_zero_at_the_aim_or_as_near_to_it_as_an_adjustment_gets():
    seen = torch.tensor([False, False])
    aim = torch.tensor([[0.1, -0.06, 0.3]] * 2)
    perfect = (0.25, -0.15, math.log(0.75))
    assert adjustment_loss(focus_of(adjustment=perfect), aim, seen) == pytest.approx(0, abs=1e-6)
    assert adjustment_loss(focus_of(), aim, seen) > 0.1
    far = torch.tensor([[0.3, 0.0, 0.1]] * 2)  # 0.75 half-extents away, and four times as small
    nearest = (REACH * MAX_SHIFT, 0.0, -REACH * math.log(MAX_ZOOM))
    assert adjustment_loss(focus_of(adjustment=nearest), far, seen) == pytest.approx(0, abs=1e-6)
    # Nothing is learnt where the image was seen whole, is not adjusted, or the aim is not in the window.
    assert adjustment_loss(focus_of(), aim, ~seen) == 0
    assert adjustment_loss(focus_of(rough=WHOLE), aim, seen) == 0
    assert adjustment_loss(focus_of(rough=[0.7, 0.7, 0.3]), aim, seen) == 0


def test_rejects_a_model_without_focus():
    model = tiny_model()
    with pytest.raises(ValueError, match='expected the answer of a model with max_focus above 1'):
        Guide(64, 10, 2.0, 1.0)(observed(model, a_batch()[0], attention=True), a_batch()[1])


def test_focus_closes_in_over_the_training():
    assert max_focus_at(0.05, 4.0) == pytest.approx(1.0, abs=0.01)
    assert max_focus_at(0.05, 4.0) > 1
    assert max_focus_at((FOCUS_BEGINS + FOCUS_COMPLETE) / 2, 4.0) == pytest.approx(2.0)
    assert max_focus_at(FOCUS_COMPLETE, 4.0) == max_focus_at(1.0, 4.0) == 4.0


def test_each_lesson_teaches_the_localisation_network_and_not_the_backbone():
    model = tiny_model(max_focus=2.0)
    focus = model.patch_embed.patching.localizer.focus
    torch.nn.init.normal_(focus.saliency[1].weight)
    torch.nn.init.normal_(focus.adjust[4].weight, std=0.1)
    focus.taught = True
    guide = Guide(focus.width, 10, 2.0, 1.0)
    torch.nn.init.normal_(guide.classifier.weight)
    images, labels = a_batch()
    answer = observed(model, images, attention=True)
    attention, all_of_them = answer.attention, torch.ones(8, dtype=torch.bool)
    aim = torch.tensor([[0.1, 0.1, 0.6]] * 8)
    lessons = {
        'saliency.1': [
            torch.nn.functional.cross_entropy(guide.classifier(answer.focus.summary), labels),
            saliency_loss(answer.focus, answer.geometry, attention, all_of_them),
        ],
        'adjust.4': [adjustment_loss(answer.focus._replace(rough=aim * 0.9), aim, ~all_of_them)],
    }
    for layer, losses in lessons.items():
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
            named = zip(model.named_parameters(), gradients, strict=True)
            reached = {name for (name, _), gradient in named if gradient is not None and gradient.abs().max() > 0}
            assert all(name.startswith('patch_embed.patching.localizer.') for name in reached)
            assert f'patch_embed.patching.localizer.focus.{layer}.weight' in reached
            assert 'patch_embed.patching.localizer.stem.0.0.weight' in reached


def test_loss_is_that_of_the_labels_and_weighted_that_of_attention():
    model = tiny_model(max_focus=2.0, num_patches=16)
    torch.nn.init.normal_(model.patch_embed.patching.localizer.focus.saliency[1].weight, std=50.0)
    images, labels = a_batch()
    answer = observed(model, images, attention=True)
    whole = answer.geometry.window[:, 2] >= 0.9
    assert not whole.any()
    aim = attended_window(answer.geometry, answer.attention, 2.0)
    taught = saliency_loss(answer.focus, answer.geometry, answer.attention, whole)
    taught += ADJUSTMENT_WEIGHT * adjustment_loss(answer.focus, aim, whole)
    assert taught > 0.01
    loss = Guide(64, 10, 2.0, 0.5)(answer, labels)
    assert loss.item() == pytest.approx(math.log(10) + 0.5 * taught.item(), rel=1e-5)
    # Attention to fewer patches says nothing of sizes.
    model.set_num_patches(15)
    few = Guide(64, 10, 2.0, 0.5)(observed(model, images, attention=True), labels)
    assert few.item() == pytest.approx(math.log(10), rel=1e-5)


def test_labels_teach_alone_where_attention_is_not_asked():
    model = tiny_model(max_focus=2.0)
    images, labels = a_batch()
    answer = observed(model, images)
    assert answer.attention is None
    assert Guide(64, 10, 2.0, 0.0)(answer, labels).item() == pytest.approx(math.log(10))
    with pytest.raises(ValueError, match='expected an answer with attention'):
        Guide(64, 10, 2.0, 1.0)(answer, labels)
    for weight in (0.0, 1.0):  # the adjustment learns through the sampling unless attention teaches it
        learner = tiny_learner(model, guide_weight=weight)
        with learner.exposed(model, 9):
            assert observed(model, images).geometry.window.requires_grad == (weight == 0)
        assert observed(model, images).geometry.window.requires_grad


def test_labels_draw_the_map_to_what_tells_the_class():
    focus = AdaptivePatching(8, 4, max_focus=3.0).localizer.focus
    features = torch.zeros(2, 64, 16, 16)
    features[0, 0, 3, 5] = features[1, 0, 9, 2] = 1.0  # what speaks for class 1
    features[0, 0, 8, 8] = features[1, 0, 8, 8] = -1.0  # and against it
    found = focus(features, torch.zeros(2, 1, 64))
    guide = Guide(64, 2, 3.0, 0.0)
    with torch.no_grad():
        guide.classifier.weight[:, 0] = torch.tensor([-1.0, 1.0])
    found.saliency.retain_grad()
    answer = Answer(torch.zeros(2, 2), torch.zeros(2, 2), whole_grid(), None, found)
    guide(answer, torch.tensor([1, 1])).backward()
    descent = -found.saliency.grad.flatten(1)
    assert descent.argmax(dim=1).tolist() == [3 * 16 + 5, 9 * 16 + 2]
    assert descent.argmin(dim=1).tolist() == [8 * 16 + 8] * 2


def test_an_update_sees_some_images_whole_and_closes_in():
    learner = tiny_learner(tiny_model(max_focus=2.0), epochs=10, whole_share=0.25)
    patching = learner.model.patch_embed.patching
    seen = []
    patching.register_forward_hook(lambda *_: seen.append((patching.whole_share, patching.localizer.focus.max_focus)))
    assert learner.update([a_batch()], 0).isfinite()
    learner.update([a_batch()], 19)
    assert seen == [(0.25, pytest.approx(1.0, abs=1e-2)), (0.25, 2.0)]
    # Nothing of the training stays on the model, whenever it is saved.
    assert (patching.whole_share, patching.max_focus, patching.localizer.focus.max_focus) == (0.0, 2.0, 2.0)
    assert not patching.localizer.focus._forward_hooks


def test_focused_run_resumes_to_the_result_of_the_unbroken_one(tmp_path, monkeypatch):
    options = (
        '--model test_apvit --img-size 32 --num-patches 4 --samples 16 --test-samples 8 --batch-size 8 --epochs 3 '
        '--max-focus 2 --guide-weight 1 --whole-share 0.3 --device cpu --no-twin --model-kwargs depth=2'
    )
    assert main(['finetune', *options.split(), '--output', str(tmp_path / 'unbroken')]) == 0
    from timm_apvit.finetuning import training

    save, saved = training.CheckpointStore.save, []

    def interrupted_save(self, *args):
        save(self, *args)
        saved.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.CheckpointStore, 'save', interrupted_save)
        assert main(['finetune', *options.split(), '--output', str(tmp_path / 'run')]) == 130
    assert len(saved) == 1
    assert main(['finetune', '--resume', str(tmp_path / 'run')]) == 0
    unbroken, resumed = (weights_of(tmp_path / name) for name in ('unbroken', 'run'))
    assert any('focus.saliency' in name for name in unbroken)
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


def test_rejects_models_and_options_that_cannot_focus():
    check_focus(tiny_model(max_focus=2.0), Options(max_focus=2.0, whole_share=0.3), 1.0)
    check_focus(tiny_model(), Options(), 1.0)
    with pytest.raises(ValueError, match='expected --max-focus above 1 with --whole-share, got none'):
        check_focus(tiny_model(), Options(whole_share=0.3), 0.0)
    with pytest.raises(ValueError, match='expected patch_drop_rate=0 with --max-focus'):
        check_focus(tiny_model(max_focus=2.0, patch_drop_rate=0.5), Options(), 1.0)
    with pytest.raises(ValueError, match='ordinary attention at its end'):
        check_focus(tiny_model(max_focus=2.0, block_fn=ParallelScalingBlock), Options(), 1.0)
    check_focus(tiny_model(max_focus=2.0, block_fn=ParallelScalingBlock), Options(), 0.0)


def test_best_is_chosen_among_epochs_of_full_focus():
    rows = [
        {'epoch': n, 'test_top1': top1, 'max_focus': f}
        for n, (top1, f) in enumerate([(0.9, 1.1), (0.5, 2.0), (0.6, 2.0)])
    ]
    assert best_row(rows[:1])['epoch'] == 0
    assert best_row(rows)['epoch'] == 2
