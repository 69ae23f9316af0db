"""A view holds what the network took, where it took it, and leaves the model as it was."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import create, move_patches, normalised, randomise
from matplotlib.path import Path as Polygon

from timm_apvit import TRANSFORMS
from timm_apvit.models.attention import patch_attention
from timm_apvit.patching.anchors import Rows, resolve_layout
from timm_apvit.patching.sampling import mip_pyramid
from timm_apvit.pictures.images import image_config
from timm_apvit.pictures.views import finest, mosaic, view_patches


def inside(outline: torch.Tensor, size: tuple[int, int], margin: float) -> np.ndarray[Any, Any]:
    """Which pixels (of centres within a polygon grown by a margin) are inside an outline."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    polygon = Polygon(outline.numpy())
    within = polygon.contains_points(points)
    dense = np.concatenate([np.linspace(a, b, 4) for a, b in pairwise(outline.numpy())])
    near = np.sqrt(((points[:, None] - dense[None]) ** 2).sum(-1).min(axis=1))
    return np.where(within, near, -near).reshape(size) > -margin


@pytest.mark.parametrize('size', [(48, 96), (90, 40)])
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_convention_pixels_that_move_a_patch_lie_within_its_outline(transform: str, size: tuple[int, int]) -> None:
    """Which pixels a patch depends on, by its gradient, against the polygon that is drawn."""
    model: Any = create(img_size=64, num_patches=6, transform=transform, max_rotation=60.0)
    image = torch.rand(3, *size)
    view = view_patches(model, image)
    pixels = normalised(model, image).requires_grad_()
    with torch.no_grad():
        geometry = model.patch_embed(pixels).geometry
    patches = model.patch_embed.patching.sample(pixels, geometry, view.layout)
    for n in range(6):
        (gradient,) = torch.autograd.grad(patches[0, n].sum(), pixels, retain_graph=True)
        weight = gradient[0].abs().sum(dim=0).numpy()
        side = torch.linalg.svdvals(view.outlines[n][[12, 36]] - view.outlines[n][[0, 0]]).max().item()
        sample = max(1.0, side / 16)
        # Interpolation at the mip level reaches beyond the outline, but not by three samples, and thinly.
        assert weight[~inside(view.outlines[n], size, margin=3 * sample)].sum() < 1e-6 * weight.sum()
        assert weight[inside(view.outlines[n], size, margin=sample / 2)].sum() > 0.97 * weight.sum()
        touched = weight > 0
        assert touched[inside(view.outlines[n], size, margin=-2.0)].all()
        assert inside(view.outlines[n], size, margin=-2.0).sum() > 20
    assert (view.outlines >= -1e-3).all()
    assert (view.outlines <= torch.tensor([size[1], size[0]]) + 1e-3).all()


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_convention_a_painted_patch_is_that_of_the_outline(transform: str) -> None:
    """Paint the inside of a patch's outline: that patch is all paint, and turns as its outline does."""
    size = (60, 120)
    model: Any = create(img_size=64, num_patches=6, transform=transform)
    model.patch_embed.patching.localizer.look = _fixed_look(model, torch.rand(1, 3, *size))
    outlines = view_patches(model, torch.zeros(3, *size)).outlines
    for n in range(6):
        painted = torch.zeros(3, *size)
        painted[0, torch.from_numpy(inside(outlines[n], size, margin=4.0))] = 1
        # Blue where the patch has its own top: nearer to its first side than to its third.
        first, third = outlines[n][:13].mean(dim=0), outlines[n][24:37].mean(dim=0)
        rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing='ij')
        points = torch.stack([columns, rows], dim=-1)
        painted[2] = ((points - first).norm(dim=-1) < (points - third).norm(dim=-1)).float()
        patch = view_patches(model, painted).patches[n]
        assert patch[..., 0].min() > 0.95  # but for what mip levels blur at its edge
        half = patch.shape[0] // 2
        assert patch[:half, :, 2].mean() > patch[half:, :, 2].mean() + 0.3


def _fixed_look(model: Any, image: torch.Tensor) -> Any:
    """A localisation network that sees one image whatever it is given."""
    look = model.patch_embed.patching.localizer.look
    return lambda _: look(mip_pyramid(image, 1))


def test_view_is_of_the_network_and_leaves_the_model() -> None:
    model: Any = move_patches(timm.create_model('test_apvit', img_size=64, num_patches=(2, 3)), 0.3).train()
    image = torch.rand(3, 50, 70)
    view = view_patches(model, image, num_patches=7)
    assert model.training
    assert model.num_patches == 6
    model.set_num_patches(7)
    model.eval()
    patches, geometry = model.patch_embed.patching(normalised(model, image), view.layout)
    std, mean = (torch.tensor(image_config(model)[key]) for key in ('std', 'mean'))
    torch.testing.assert_close(view.patches, (patches[0].movedim(1, -1) * std + mean).clamp(0, 1))
    torch.testing.assert_close(view.pixels, image.movedim(0, -1))
    assert view.fixed.shape == view.patches.shape == (7, 16, 16, 3)
    torch.testing.assert_close(view.centres, (geometry.centres[0].double() + 1) / 2 * torch.tensor([70.0, 50.0]))
    assert view.attention is None
    assert view.window is None


def test_fixed_patches_reassemble_to_the_image() -> None:
    model: Any = create(img_size=(48, 80))
    view = view_patches(model, torch.rand(3, 48, 80))
    torch.testing.assert_close(mosaic(view.fixed, view.layout), view.pixels)
    assert (mosaic(view.patches, view.layout) - view.pixels).abs().max() > 0.1


def test_mosaic_of_uneven_rows_keeps_every_patch_in_its_place() -> None:
    layout = resolve_layout(7, (1, 1))
    assert finest(layout)[0].lengths == [2, 2, 3]
    patches = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 2, 2, 3)
    whole = mosaic(patches, layout)[..., 0]
    assert whole.shape == (24, 24)
    assert whole[4, [0, 11, 12, 23]].tolist() == [0, 0, 1, 1]
    assert whole[20, [0, 7, 8, 15, 16, 23]].tolist() == [4, 4, 5, 5, 6, 6]


def test_attention_is_that_of_the_last_block() -> None:
    model: Any = randomise(create(img_size=64, num_patches=5)).eval()
    image = torch.rand(3, 40, 60)
    seen: list[Any] = []
    handle = model.blocks[-1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(normalised(model, image))
    handle.remove()
    expected = patch_attention(model, model.blocks[-1].attn, seen[0])[0] * 5
    view = view_patches(model, image, attention=True)
    assert view.attention is not None
    torch.testing.assert_close(view.attention, expected.detach())
    assert view.attention.sum().item() == pytest.approx(5, abs=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_attention_is_that_of_the_models_own(dtype: torch.dtype) -> None:
    model: Any = randomise(create(img_size=64, num_patches=5, qk_norm=True)).eval()
    image = torch.rand(3, 40, 60)
    expected = view_patches(model, image, attention=True).attention
    received = view_patches(model.to(dtype), image, attention=True).attention
    assert expected is not None
    assert received is not None
    torch.testing.assert_close(received, expected, rtol=0.05, atol=0.05)


def test_window_frames_where_the_anchors_were_put() -> None:
    model: Any = timm.create_model('test_apvit', img_size=64, num_patches=(3, 3), localizer='glance').eval()
    torch.nn.init.normal_(model.patch_embed.patching.localizer.classes[-1].weight, std=10.0)
    image = torch.rand(3, 50, 90)
    view = view_patches(model, image)
    window = model.patch_geometry(normalised(model, image)).window[0]
    assert window[2] < 0.9
    assert view.window is not None
    # Unmoved patches tile their window.
    corners = view.outlines.flatten(0, 1)
    torch.testing.assert_close(view.window.amin(dim=0), corners.amin(dim=0), atol=1e-2, rtol=0)
    torch.testing.assert_close(view.window.amax(dim=0), corners.amax(dim=0), atol=1e-2, rtol=0)


def test_padded_and_cropped_images_are_shown_as_they_are_tiled() -> None:
    padded: Any = create(img_size=64, dynamic_img_size=True, dynamic_img_pad=True)
    view = view_patches(padded, torch.rand(3, 40, 50))
    assert view.pixels.shape == (48, 64, 3)
    assert view.layout.grids == (Rows(12, 3),)
    cropped: Any = create(img_size=50, dynamic_img_size=False)
    assert view_patches(cropped, torch.rand(3, 50, 50)).pixels.shape == (48, 48, 3)


@pytest.mark.parametrize('channels', [1, 5])
def test_shape_of_other_channels_and_types(channels: int) -> None:
    model: Any = create(img_size=32, in_chans=channels).to(torch.bfloat16)
    view = view_patches(model, torch.rand(channels, 20, 30))
    assert view.pixels.shape == (20, 30, 3)
    assert view.patches.dtype == torch.float32


def test_modules_stay_in_the_mode_that_they_were_in() -> None:
    model: Any = create(img_size=32).train()
    model.blocks.eval()
    view_patches(model, torch.rand(3, 20, 30), 3)
    assert model.training
    assert not any(module.training for module in model.blocks.modules())
    model.eval().pos_drop.train()
    view_patches(model, torch.rand(3, 20, 30))
    assert [name for name, module in model.named_modules() if module.training] == ['pos_drop']


def test_rejects_other_models_and_attention_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match='expected an APViT, got VisionTransformer'):
        view_patches(timm.create_model('test_vit'), torch.rand(3, 8, 8))  # type: ignore[arg-type]
    model: Any = create(img_size=32)
    model.blocks[-1].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match='got a model without'):
        view_patches(model, torch.rand(3, 8, 8), attention=True)
