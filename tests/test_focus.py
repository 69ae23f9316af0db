"""The window in which all anchors lie."""

import math

import pytest
import timm
import torch
from conftest import assert_equal_up_to_rounding, create, vit_and_apvit

from timm_apvit import AdaptivePatching
from timm_apvit.patching.focus import MARGIN, adjusted_window, saliency_window


def peaked(x: int, y: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    saliency = torch.zeros(1, *size)
    saliency[0, y, x] = 20.0
    return saliency


def test_flat_saliency_is_the_whole_image():
    for size in ((16, 16), (3, 5), (1, 1)):
        assert torch.equal(saliency_window(torch.zeros(2, *size), 4.0), torch.tensor([[0.0, 0.0, 1.0]] * 2))


def test_convention_window_centre_is_xy_and_lies_inside_the_image():
    window = saliency_window(peaked(10, 3), 4.0)[0]
    assert torch.allclose(window, torch.tensor([21 / 16 - 1, 7 / 16 - 1, 0.25]), atol=1e-4)
    corner = saliency_window(peaked(0, 15), 4.0)[0]  # cell centres at -15/16 and 15/16: too near to the border
    assert torch.allclose(corner, torch.tensor([-0.75, 0.75, 0.25]), atol=1e-4)


def test_window_has_the_spread_of_the_saliency():
    saliency = torch.full((1, 16, 16), -100.0)
    saliency[0, 6:10, 4:8] = 0.0
    centre_x, centre_y, extent = saliency_window(saliency, 100.0)[0].tolist()
    assert (centre_x, centre_y) == pytest.approx((-0.25, 0.0), abs=1e-5)
    assert extent == pytest.approx(MARGIN * 4 / 16, rel=1e-4)


def test_convention_adjustment_shifts_by_half_extents_and_scales_by_an_exponent():
    rough = torch.tensor([[0.2, -0.1, 0.4], [0.2, -0.1, 0.4], [0.8, 0.8, 0.2]])
    adjustment = torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.0, -math.log(2)], [0.5, 0.5, 1.0]])
    expected = [[0.4, -0.3, 0.4], [0.2, -0.1, 0.2], [1 - 0.2 * math.e, 1 - 0.2 * math.e, 0.2 * math.e]]
    assert torch.allclose(adjusted_window(rough, adjustment, 10.0), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(adjusted_window(rough, adjustment, 4.0)[1], torch.tensor([0.2, -0.1, 0.25]), atol=1e-6)


def test_the_whole_image_is_not_adjusted_and_almost_all_of_it_half():
    adjustment = torch.tensor([[0.5, 0.5, -math.log(2)]])
    assert adjusted_window(torch.tensor([[0.0, 0.0, 1.0]]), adjustment, 5.0).tolist() == [[0.0, 0.0, 1.0]]
    half = adjusted_window(torch.tensor([[0.0, 0.0, 0.95]]), adjustment, 5.0)
    assert torch.allclose(half[:, 2], torch.tensor(0.95 / math.sqrt(2)))


def test_gradients_lead_a_window_back_from_its_bounds():
    adjustment = torch.tensor([[0.0, 0.0, -0.6], [0.5, 0.5, 0.0]], requires_grad=True)
    window = adjusted_window(torch.tensor([[0.0, 0.0, 0.4], [0.5, 0.0, 0.45]]), adjustment, 2.5)
    assert torch.allclose(window[:, 2], torch.tensor([0.4, 0.45]))
    (-window[0, 2] + window[1, 0]).backward()  # wants the first one larger, and the second one further to the left
    assert adjustment.grad[0, 2] < 0
    assert adjustment.grad[1, 0] > 0


def test_the_sampling_teaches_the_adjustment_and_never_the_map():
    patching = AdaptivePatching(8, (4, 4), max_focus=3.0)
    torch.nn.init.normal_(patching.localizer.focus.saliency[1].weight, std=50.0)
    patches, geometry = patching(torch.rand(3, 3, 64, 48))
    assert (geometry.window[:, 2] < 0.9).all()
    patches.square().sum().backward()
    gradients = {name: p.grad for name, p in patching.localizer.focus.named_parameters()}
    for name, gradient in gradients.items():
        # Every parameter has a gradient: DistributedDataParallel waits for it.
        if name.startswith('saliency'):
            assert (gradient == 0).all()
    assert (gradients['adjust.4.weight'] != 0).any()


def test_a_new_model_with_focus_is_the_vit():
    vit, model = vit_and_apvit('test_vit', 'test_apvit')
    focused = timm.create_model('test_apvit', max_focus=3.0).eval()
    focused.load_state_dict(model.state_dict())  # which knows no saliency
    image = torch.randn(2, 3, 160, 160)
    assert_equal_up_to_rounding(focused(image), vit(image))


def test_focus_moves_all_patches_into_one_window():
    patching = AdaptivePatching(8, (4, 4), 'translation', max_focus=2.0)
    with torch.no_grad():
        patching.localizer.focus.saliency[1].weight.normal_(std=50.0)
        patching.localizer.focus.adjust[4].weight.normal_(std=0.1)
        patches, geometry = patching(torch.rand(3, 3, 64, 48))
    centre, extent = geometry.window[:, None, :2], geometry.window[:, None, 2:]
    assert patches.shape == (3, 16, 3, 8, 8)
    assert geometry.saliency.shape == (3, 16, 16)
    assert (geometry.window[:, 2] < 1).all()
    plain = AdaptivePatching(8, (4, 4), 'translation')(torch.rand(3, 3, 64, 48))[1]
    assert torch.allclose(geometry.centres, centre + extent * plain.centres, atol=1e-6)
    assert torch.allclose(geometry.extents, extent * plain.extents, atol=1e-6)


def test_some_images_are_seen_whole_in_train_mode_only():
    patching = AdaptivePatching(8, 4, max_focus=2.0, whole_share=0.5)
    torch.nn.init.normal_(patching.localizer.focus.saliency[1].weight, std=5.0)
    image = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1)
    whole = patching(image)[1].window[:, 2] == 1
    assert 10 < whole.sum() < 54
    assert not (patching.eval()(image)[1].window[:, 2] == 1).any()


@pytest.mark.parametrize('num', [1, 7, (2, 5)])
def test_any_budget_and_image_size(num):
    model = create(max_focus=3.0, num_patches=num)
    torch.nn.init.normal_(model.patch_embed.patching.localizer.focus.saliency[1].weight, std=5.0)
    for size in ((1, 1), (33, 70)):
        geometry = model.patch_geometry(torch.rand(2, 3, *size))
        corners = geometry.outlines()
        assert corners.abs().max() <= 1 + 1e-6
        assert torch.isfinite(model(torch.rand(2, 3, *size))).all()


def test_a_focused_model_exports_and_is_rebuilt():
    model = create(max_focus=3.0)
    torch.nn.init.normal_(model.patch_embed.patching.localizer.focus.saliency[1].weight, std=2.0)
    image = torch.rand(2, 3, 160, 160)
    expected = model(image)
    assert_equal_up_to_rounding(torch.export.export(model, (image,)).module()(image), expected)
    rebuilt = timm.create_model('test_apvit', **model.adaptive_args()).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(image), expected)


@pytest.mark.parametrize('max_focus', [0.5, 5.5, float('nan'), '2'])
def test_rejects_a_focus_out_of_range(max_focus):
    with pytest.raises(ValueError, match='expected max_focus to be a finite number within'):
        AdaptivePatching(max_focus=max_focus)
