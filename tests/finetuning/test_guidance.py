"""What the saliency map learns from attention."""

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from tiny import a_batch, tiny_learner, tiny_model, weights_of

from timm_apvit.__main__ import main
from timm_apvit.finetuning.distillation import attention_on_grid, observed
from timm_apvit.finetuning.guidance import max_focus_at, saliency_loss
from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.soundness import check_focus
from timm_apvit.finetuning.training import best_row
from timm_apvit.patching import AdaptivePatching

WHOLE, CLOSE = [0.0, 0.0, 1.0], [0.0, 0.0, 0.4]


def whole_grid(side: int = 4):
    """Geometry of the full grid, without a batch's own motion: ``(2, side^2)`` patches."""
    return AdaptivePatching(8, (side, side), max_focus=2.0)(torch.rand(2, 3, 32, 32))[1]


def test_attention_lies_on_the_cells_of_its_patches():
    attention = torch.rand(2, 16)
    attention = attention / attention.sum(dim=1, keepdim=True)
    assert torch.allclose(attention_on_grid(whole_grid(), attention, (4, 4)), attention, atol=1e-6)
    fine = attention_on_grid(whole_grid(), attention, (8, 8)).view(2, 4, 2, 4, 2)
    assert torch.allclose(fine.sum(dim=(2, 4)).flatten(1), attention, atol=1e-6)


def test_saliency_loss_is_the_divergence_over_images_seen_whole():
    attention = torch.softmax(torch.randn(2, 16), dim=1)
    geometry = whole_grid()._replace(saliency=attention.log().view(2, 4, 4), window=torch.tensor([WHOLE, CLOSE]))
    assert saliency_loss(geometry, attention).abs() < 1e-5
    # The second image was not seen whole, and counts for nothing.
    assert saliency_loss(geometry, torch.stack([attention[0], attention[0]])).abs() < 1e-5
    flat = geometry._replace(saliency=torch.zeros(2, 4, 4))
    entropy = -(attention[0] * attention[0].log()).sum()
    assert saliency_loss(flat, attention) == pytest.approx((torch.tensor(16.0).log() - entropy).item(), abs=1e-5)
    none_whole = geometry._replace(window=torch.tensor([CLOSE, CLOSE]))
    assert saliency_loss(none_whole, attention) == 0


def test_rejects_a_model_without_focus():
    with pytest.raises(ValueError, match='expected the geometry of a model with max_focus above 1'):
        saliency_loss(whole_grid()._replace(saliency=None), torch.ones(2, 16))


def test_focus_closes_in_over_the_training():
    assert max_focus_at(0.05, 4.0) == pytest.approx(1.0, abs=0.01)
    assert max_focus_at(0.05, 4.0) > 1
    assert max_focus_at(0.25, 4.0) == pytest.approx(2.0)
    assert max_focus_at(0.4, 4.0) == max_focus_at(1.0, 4.0) == 4.0


def test_attention_teaches_the_localisation_network_and_not_the_backbone():
    model = tiny_model(max_focus=2.0)
    torch.nn.init.normal_(model.patch_embed.patching.localizer.saliency[1].weight)
    answer = observed(model, a_batch()[0], attention=True)
    assert answer.attention is not None
    saliency_loss(answer.geometry, answer.attention).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {name.split('.')[3] for name in reached} == {'stem', 'context', 'from_context', 'saliency'}
    assert all(name.startswith('patch_embed.patching.localizer.') for name in reached)


def test_a_localisation_network_finds_what_is_attended_to():
    torch.manual_seed(0)
    patching = AdaptivePatching(8, (8, 8), max_focus=4.0)
    patching.whole_share = 1.0
    optimizer = torch.optim.AdamW(patching.parameters(), lr=3e-3)

    def bright_cells(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        cell = torch.randint(64, (number,))
        attention = torch.nn.functional.one_hot(cell, 64).float()
        image = attention.view(-1, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
        return (image + 0.1 * torch.randn(number, 1, 64, 64)).expand(-1, 3, -1, -1), attention

    for _ in range(40):
        image, attention = bright_cells(32)
        loss = saliency_loss(patching(image)[1], attention)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, attention = bright_cells(64)
    window = patching.eval()(image)[1].window
    cell = attention.argmax(dim=1)
    centre = torch.stack([cell % 8, cell // 8], dim=1) / 4 - 0.875
    assert ((window[:, :2] - centre).abs() <= window[:, 2:]).all(dim=1).float().mean() > 0.9
    assert window[:, 2].mean() < 0.5


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
    assert any('saliency' in name for name in unbroken)
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
