"""What teaches the focus where to look."""

import math

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import a_batch, tiny_learner, tiny_model, weights_of

from timm_apvit.__main__ import main
from timm_apvit.finetuning.distillation import attention_on_grid, observed
from timm_apvit.finetuning.guidance import (
    FOCUS_BEGINS,
    FOCUS_COMPLETE,
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
from timm_apvit.focus import Focus
from timm_apvit.patching import AdaptivePatching

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
    focus = focus_of(attention.log().view(2, 4, 4))
    geometry = whole_grid()._replace(window=torch.tensor([WHOLE, CLOSE]))
    assert saliency_loss(focus, geometry, attention).abs() < 1e-5
    # The second image was not seen whole, and counts for nothing.
    assert saliency_loss(focus, geometry, torch.stack([attention[0], attention[0]])).abs() < 1e-5
    entropy = -(attention[0] * attention[0].log()).sum()
    expected = (torch.tensor(16.0).log() - entropy).item()
    assert saliency_loss(focus_of(), geometry, attention) == pytest.approx(expected, abs=1e-5)
    none_whole = geometry._replace(window=torch.tensor([CLOSE, CLOSE]))
    assert saliency_loss(focus, none_whole, attention) == 0


def test_attended_window_is_the_spread_of_attention_in_the_image():
    geometry = whole_grid(8)
    # Even attention to the 2 x 4 cells at rows 2-3 and columns 4-7: centre (0.5, -0.25), half-extents 0.5 and 0.25.
    even = torch.zeros(8, 8)
    even[2:4, 4:8] = 1 / 8
    window = attended_window(geometry, even.flatten().expand(2, -1), max_focus=5.0)
    assert torch.allclose(window[:, :2], torch.tensor([0.5, -0.25]), atol=1e-6)
    assert torch.allclose(window[:, 2], torch.tensor(ROOM * ((0.25 + 0.0625) / 2) ** 0.5), atol=1e-6)
    everywhere = attended_window(geometry, torch.full((2, 64), 1 / 64), max_focus=5.0)
    assert torch.allclose(everywhere, torch.tensor(WHOLE), atol=1e-6)


def test_adjustment_loss_is_zero_where_the_window_has_what_is_attended_to():
    geometry = whole_grid(8)
    attention = torch.nn.functional.one_hot(torch.tensor([27, 27]), 64).float()  # row 3, column 3
    aim = attended_window(geometry, attention, 5.0)[0]
    shift = ((aim[:2]) / 0.4).tolist()
    perfect = (*shift, math.log(aim[2] / 0.4))
    assert adjustment_loss(focus_of(adjustment=perfect), geometry, attention, 5.0) == pytest.approx(0, abs=1e-6)
    assert adjustment_loss(focus_of(), geometry, attention, 5.0) > 0.1
    # Neither the whole image nor a window that has nothing of it can be adjusted to it.
    assert adjustment_loss(focus_of(rough=WHOLE), geometry, attention, 5.0) == 0
    assert adjustment_loss(focus_of(rough=[0.7, 0.7, 0.3]), geometry, attention, 5.0) == 0


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
    focus = model.patch_embed.patching.focus
    torch.nn.init.normal_(focus.saliency[1].weight)
    torch.nn.init.normal_(focus.adjust[4].weight, std=0.1)
    focus.taught = True
    guide = Guide(focus.width, 10, 2.0, 1.0)
    torch.nn.init.normal_(guide.classifier.weight)
    images, labels = a_batch()
    answer = observed(model, images, attention=True)
    seen = (answer.focus, answer.geometry, answer.attention)
    lessons = {
        'labels': (torch.nn.functional.cross_entropy(guide.classifier(answer.focus.summary), labels), 'saliency'),
        'map': (saliency_loss(answer.focus, answer.geometry._replace(window=torch.ones(8, 3)), answer.attention),
                'saliency'),
        'adjustment': (adjustment_loss(*seen, 2.0), 'adjust'),
    }  # fmt: skip
    for loss, layer in lessons.values():
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
        reached = {
            name for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True)
            if gradient is not None and gradient.abs().max() > 0
        }  # fmt: skip
        assert all(
            name.startswith(('patch_embed.patching.localizer.', 'patch_embed.patching.focus.')) for name in reached
        )
        assert f'patch_embed.patching.focus.{layer}.0.weight' in {
            n.replace('saliency.0.0', 'saliency.0') for n in reached
        }
        assert 'patch_embed.patching.localizer.stem.0.0.weight' in reached
    assert guide(answer, labels).item() == pytest.approx(
        sum(w * lessons[n][0].item() for n, w in (('labels', 1), ('adjustment', 3)))
        + saliency_loss(*seen).item(), rel=1e-5,
    )  # fmt: skip


def test_labels_teach_alone_where_attention_is_not_asked():
    model = tiny_model(max_focus=2.0)
    images, labels = a_batch()
    answer = observed(model, images)
    assert answer.attention is None
    assert Guide(64, 10, 2.0, 0.0)(answer, labels).item() == pytest.approx(math.log(10))
    with pytest.raises(ValueError, match='expected an answer with attention'):
        Guide(64, 10, 2.0, 1.0)(answer, labels)
    assert not tiny_learner(model, guide_weight=0.0).model.patch_embed.patching.focus.taught
    assert tiny_learner(model).model.patch_embed.patching.focus.taught


def test_labels_alone_find_what_tells_the_class():
    torch.manual_seed(0)
    patching = AdaptivePatching(8, (4, 4), max_focus=3.0)
    guide = Guide(patching.focus.width, 2, 3.0, 0.0)
    optimizer = torch.optim.AdamW([*patching.parameters(), *guide.parameters()], lr=3e-3)

    def bars(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Upright and lying bars, the classes, among dots."""
        label, place = torch.randint(2, (number,)), torch.randint(8, (number, 2))
        image = 0.3 * torch.randn(number, 3, 64, 64)
        for n in range(number):
            y, x = (8 * place[n]).tolist()
            rows, columns = (slice(y, y + 8), slice(x + 3, x + 5))
            image[n, :, rows, columns] = 3.0
            if label[n]:
                image[n, :, y : y + 8, x : x + 8] = image[n, :, y : y + 8, x : x + 8].transpose(-1, -2).clone()
        return image, label, place

    for _ in range(150):
        image, label, _ = bars(32)
        features, context = patching.localizer.look(image)
        found = patching.focus(features, context, 3.0)
        loss = torch.nn.functional.cross_entropy(guide.classifier(found.summary), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, _, place = bars(64)
    window = patching.eval()(image)[1].window
    centre = place.flip(1) / 4 - 0.875
    assert ((window[:, :2] - centre).abs() <= window[:, 2:]).all(dim=1).float().mean() > 0.9


def test_an_update_sees_some_images_whole_and_closes_in():
    learner = tiny_learner(tiny_model(max_focus=2.0), epochs=10, whole_share=0.25)
    assert learner.update([a_batch()], 0).isfinite()
    patching = learner.model.patch_embed.patching
    assert (patching.whole_share, patching.max_focus) == (0.25, pytest.approx(1.0, abs=1e-2))
    learner.update([a_batch()], 19)
    assert patching.max_focus == learner.tested_model().patch_embed.patching.max_focus == 2.0


def test_focused_run_resumes_to_the_result_of_the_unbroken_one(tmp_path, monkeypatch):
    options = (
        '--model test_apvit --img-size 32 --num-patches 4 --samples 16 --test-samples 8 --batch-size 8 --epochs 3 '
        '--max-focus 2 --device cpu --no-twin --model-kwargs depth=2'
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
    check_focus(tiny_model(max_focus=2.0), Options(max_focus=2.0, whole_share=0.3))
    check_focus(tiny_model(), Options())
    with pytest.raises(ValueError, match='expected --max-focus above 1 with --whole-share, got none'):
        check_focus(tiny_model(), Options(whole_share=0.3))
    with pytest.raises(ValueError, match='expected patch_drop_rate=0 with --max-focus'):
        check_focus(tiny_model(max_focus=2.0, patch_drop_rate=0.5), Options())
    with pytest.raises(ValueError, match='ordinary attention at its end'):
        check_focus(tiny_model(max_focus=2.0, block_fn=ParallelScalingBlock), Options())


def test_best_is_chosen_among_epochs_of_full_focus():
    rows = [
        {'epoch': n, 'test_top1': top1, 'max_focus': f}
        for n, (top1, f) in enumerate([(0.9, 1.1), (0.5, 2.0), (0.6, 2.0)])
    ]
    assert best_row(rows[:1])['epoch'] == 0
    assert best_row(rows)['epoch'] == 2
