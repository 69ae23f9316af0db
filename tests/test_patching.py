"""Adaptive patching and its localisation network, standing alone."""

import copy
import inspect

import pytest
import timm
import torch
from conftest import move_patches
from torch import nn

from timm_apvit import TRANSFORMS, AdaptivePatching, interpolate_pos_embed
from timm_apvit.models.mixin import ADAPTIVE_ARGS
from timm_apvit.patching.anchors import Anchors, Rows, resolve_layout
from timm_apvit.patching.cnn import CNNLocalizer
from timm_apvit.patching.layers import ZeroLinear
from timm_apvit.patching.sampling import mip_pyramid
from timm_apvit.patching.transforms import BOUNDS


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_identity_at_init(transform):
    image = torch.randn(2, 3, 64, 96)
    patches, geometry = AdaptivePatching(16, (4, 6), transform)(image)
    expected = image.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-4)
    assert geometry.rotation.abs().max() == 0


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (97, 211), (16, 16)])
@pytest.mark.parametrize('num', [1, 7, (2, 3)])
@pytest.mark.parametrize('transform', ['affine', 'projective', 'tps'])
def test_shape_any_number_of_patches_and_any_image(size, num, transform):
    patching = move_patches(AdaptivePatching((4, 6), num, transform, in_chans=2))
    count = num if isinstance(num, int) else 6
    patches, geometry = patching(torch.randn(3, 2, *size))
    assert patches.shape == (3, count, 2, 4, 6)
    assert geometry.centres.shape == geometry.extents.shape == (3, count, 2)
    assert geometry.rotation.shape == geometry.shear.shape == (3, count)
    assert geometry.outlines(3).shape == (3, count, 13, 2)
    assert patches.isfinite().all()


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_shape_empty_batch(transform):
    patches, geometry = AdaptivePatching(8, 5, transform)(torch.zeros(0, 3, 32, 32))
    assert patches.shape == (0, 5, 3, 8, 8)
    assert geometry.centres.shape == (0, 5, 2)


def test_results_do_not_depend_on_the_batch():
    patching = move_patches(AdaptivePatching(8, 9, 'affine')).eval()
    image = torch.randn(4, 3, 40, 56)
    patches, geometry = patching(image)
    order = torch.tensor([2, 0, 3, 1])
    shuffled, _ = patching(image[order])
    torch.testing.assert_close(shuffled, patches[order], rtol=0, atol=1e-4)
    alone, alone_geometry = patching(image[1:2])
    # A batch of another size may take another convolution kernel: positions differ by rounding, and noise magnifies it.
    torch.testing.assert_close(alone, patches[1:2], rtol=0, atol=1e-3)
    torch.testing.assert_close(alone_geometry.centres, geometry.centres[1:2], rtol=0, atol=1e-5)
    assert (geometry.centres[0] - geometry.centres[1]).abs().max() > 0.01  # yet images do differ


def test_every_parameter_gets_a_gradient_once_the_identity_is_left():
    patching = AdaptivePatching(8, 9, 'affine')
    optimiser = torch.optim.SGD(patching.parameters(), lr=1.0)
    image, target = torch.rand(2, 3, 48, 48), torch.rand(2, 9, 3, 8, 8)
    for _ in range(2):
        optimiser.zero_grad()
        (patching(image)[0] - target).square().mean().backward()
        optimiser.step()
    assert [name for name, p in patching.named_parameters() if not p.grad.abs().max() > 0] == []


def test_gradient_reaches_the_image():
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    AdaptivePatching(8, 4)(image)[0].sum().backward()
    torch.testing.assert_close(image.grad.sum(), torch.tensor(float(4 * 3 * 64)))


def test_learns_to_look_at_an_object():
    """One patch among noise finds a bright square, though it starts elsewhere and must react to what is far from it."""
    patching = AdaptivePatching(8, (2, 2), 'scale', in_chans=1, max_shift=2.0)
    optimiser = torch.optim.Adam(patching.parameters(), lr=3e-3)

    def scene(batch):
        image, corner = torch.rand(batch, 1, 48, 48) * 0.3, torch.randint(0, 36, (batch, 2))
        for i, (x, y) in enumerate(corner.tolist()):
            image[i, :, y : y + 12, x : x + 12] = 1
        return image, (corner + 6) / 24 - 1.0

    for _ in range(80):
        image, centre = scene(16)
        patches, _ = patching(image)
        loss = -patches.mean(dim=(2, 3, 4)).amax(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    image, centre = scene(64)
    distance = (patching(image)[1].centres - centre[:, None]).norm(dim=-1).amin(dim=1).mean().item()
    fixed = (AdaptivePatching(8, (2, 2), in_chans=1)(image)[1].centres - centre[:, None]).norm(dim=-1).amin(dim=1)
    assert distance < 0.6 * fixed.mean().item()


def test_jitter_is_for_training_only_and_in_units_of_the_patch():
    patching = AdaptivePatching(8, (8, 8), jitter=0.2)
    image = torch.rand(16, 3, 64, 64)
    still = patching.eval()(image)[1].centres
    torch.testing.assert_close(patching(image)[1].centres, still, rtol=0, atol=0)
    moved = patching.train()(image)[1].centres
    inner = (still[0].abs() < 0.8).all(dim=-1)
    spread = ((moved - still)[:, inner] * 8).std().item()
    assert spread == pytest.approx(0.2, rel=0.1)
    assert not torch.equal(patching(image)[1].centres, moved)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_dtype_geometry_stays_float32(dtype):
    patching = move_patches(AdaptivePatching(8, 9, 'affine'), std=0.3)
    image = torch.rand(1, 3, 64, 64)
    exact = patching(image)[1].centres
    patches, geometry = copy.deepcopy(patching).to(dtype)(image.to(dtype))
    assert {value.dtype for value in geometry if value is not None} | {patches.dtype} == {torch.float32}
    assert (geometry.centres - exact).abs().max() < 0.05
    with torch.autocast('cpu', dtype=torch.bfloat16):
        patches, geometry = patching(image)
    assert {value.dtype for value in geometry if value is not None} | {patches.dtype} == {torch.float32}


def test_rejects_bad_images_and_arguments():
    patching = AdaptivePatching(8, 4)
    for image, message in [
        (torch.zeros(1, 1, 8, 8), r'expected an image of shape \(B, 3, H, W\), got \[1, 1, 8, 8\]'),
        (torch.zeros(3, 8, 8), r'expected an image of shape \(B, 3, H, W\), got \[3, 8, 8\]'),
        (torch.zeros(1, 3, 0, 8), r'got \[1, 3, 0, 8\]'),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 'floating-point image, got dtype torch.uint8'),
    ]:
        with pytest.raises(ValueError, match=message):
            patching(image)
    for bad in (-0.1, float('nan'), '0.1', True, [1]):
        with pytest.raises(ValueError, match='expected jitter to be a finite number within'):
            AdaptivePatching(jitter=bad)
    for bad in (0, -4, 2.5, (4,), (4, 0), True):
        with pytest.raises(ValueError, match='expected patch_size to be'):
            AdaptivePatching(patch_size=bad)


def test_set_num_patches_and_layout():
    patching, image = AdaptivePatching(8, 4), torch.rand(1, 3, 32, 32)
    patching.set_num_patches((2, 5))
    assert patching(image)[0].shape[1] == 10
    assert patching(image, layout=resolve_layout(7, (2, 1)))[0].shape[1] == 7
    with pytest.raises(ValueError, match='expected 1 <= rows <= num_patches, got 7 rows of 3 patches'):
        Rows(3, 7)
    with pytest.raises(ValueError, match='expected num_patches'):
        patching.set_num_patches(0)


def test_arguments_of_a_model_are_those_of_the_patching():
    patching = inspect.signature(AdaptivePatching).parameters
    defaults = {name: patching[name].default for name in ADAPTIVE_ARGS - BOUNDS.keys() - {'num_patches'}}
    model = timm.create_model('test_apvit')
    assert model.adaptive_args() == {
        'num_patches': None, **defaults, **{name: bound.default for name, bound in BOUNDS.items()}
    }  # fmt: skip


def test_localizer_parameters_know_neither_patches_nor_image():
    localizer = CNNLocalizer({'shift': 2}, in_chans=1)
    shapes = {name: p.shape for name, p in localizer.named_parameters()}
    for num, size in ((3, (5, 9)), (50, (200, 100))):
        anchors = Anchors(torch.rand(num, 2) * 2 - 1, torch.rand(num, 2))
        pyramid = mip_pyramid(torch.rand(2, 1, *size), localizer.level(size) + 1)
        assert localizer(localizer.look(pyramid), anchors)['shift'].shape == (2, num, 2)
    assert shapes == {name: p.shape for name, p in CNNLocalizer({'shift': 2}, in_chans=1).named_parameters()}


def test_zero_linear_stays_zero_in_every_initialisation():
    layer = ZeroLinear(3, 2)
    for reset in (layer.init_weights, layer.reset_parameters):
        nn.init.ones_(layer.weight)
        reset()
        assert layer(torch.rand(4, 3)).abs().max() == 0


def test_stands_alone_in_torchvision_vit():
    """Someone else's ViT: torchvision's, with identity at init, from the two public pieces alone."""
    models = pytest.importorskip('torchvision.models')
    vit = models.VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5).eval()
    nn.init.normal_(vit.heads.head.weight)

    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.patching = vit, AdaptivePatching(16, (4, 4))

        def forward(self, image):
            patches, geometry = self.patching(image)
            x = patches.flatten(2) @ self.vit.conv_proj.weight.flatten(1).T + self.vit.conv_proj.bias
            x = torch.cat([self.vit.class_token.expand(len(x), -1, -1), x], dim=1)
            encoder = self.vit.encoder
            x = x + interpolate_pos_embed(encoder.pos_embedding, geometry.centres, (4, 4), num_prefix_tokens=1)
            return self.vit.heads(encoder.ln(encoder.layers(encoder.dropout(x)))[:, 0])

    model, image = Adaptive().eval(), torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(image), vit(image), rtol=0, atol=1e-4)
    assert model(torch.rand(1, 3, 100, 333)).shape == (1, 5)
