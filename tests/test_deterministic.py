"""Deterministic algorithms: what they compute, and that nothing else runs where they are asked for."""

from contextlib import contextmanager

import pytest
import timm
import torch
from conftest import create, randomise
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_apvit import TRANSFORMS, interpolate_pos_embed, resample_pos_embed
from timm_apvit.patching.deterministic import grid_sample, indexed_grid_sample, multiplied_resize, resize
from timm_apvit.patching.sampling import mip_pyramid, sample_patches

# What CUDA refuses, by PyTorch's documentation of `torch.use_deterministic_algorithms`: operators whose names begin so.
# (It replaces `replication_pad2d` itself, and makes `index_put` and `scatter_add` sort.)
REFUSED = (
    'adaptive_avg_pool2d_backward', 'adaptive_avg_pool3d_backward', 'adaptive_max_pool', 'avg_pool3d_backward',
    'bincount', 'ctc_loss_backward', 'cumsum', 'embedding_bag', 'fractional_max_pool', 'grid_sampler_2d_backward',
    'grid_sampler_3d_backward', 'histc', 'max_unpool', 'median', 'nanmedian', 'kthvalue', 'nll_loss2d', 'put',
    'reflection_pad1d_backward', 'reflection_pad2d_backward', 'reflection_pad3d_backward', 'resize_quantized',
    'upsample_bicubic2d_backward', 'upsample_bilinear2d_backward', 'upsample_linear1d_backward',
    'upsample_trilinear3d_backward', 'upsample_bilinear2d_aa_backward', 'upsample_bicubic2d_aa_backward',
)  # fmt: skip


class Operators(TorchDispatchMode):
    """Notes the names of the operators that run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def refused(self):
        return sorted(name for name in self.names if name.lstrip('_').startswith(REFUSED))


@contextmanager
def deterministic(mode=True):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def gradients(function, *inputs):
    """The result of a function and the gradients of its inputs, for a fixed random loss."""
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    output = function(*inputs)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype))
    return [output.detach(), *(each.grad for each in inputs)]


def assert_all_close(actual, expected, tolerance=1e-5):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('padding_mode', ['border', 'zeros'])
@pytest.mark.parametrize('size', [(7, 10), (1, 4), (5, 1), (1, 1)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_indexed_reading_is_grid_sample(padding_mode, size, dtype):
    texture = torch.randn(2, 3, *size, dtype=dtype)
    grid = torch.rand(2, 40, 9, 2, dtype=dtype) * 3 - 1.5  # a part lies beyond the edges
    # On the outermost cells' centres, where a position stops to have a gradient.
    grid[:, 0, :, 0], grid[:, 1, :, 1] = 1 / size[1] - 1, 1 - 1 / size[0]
    expected = gradients(lambda *inputs: grid_sample(*inputs, padding_mode), texture, grid)
    with deterministic():
        actual = gradients(lambda *inputs: grid_sample(*inputs, padding_mode), texture, grid)
    assert_all_close(actual, expected)


@pytest.mark.parametrize('padding_mode', ['border', 'zeros'])
def test_gradcheck_indexed_reading_and_its_own_gradient(padding_mode):
    # Away from cell centres and edges, where there are kinks.
    cell = torch.tensor([[-0.7, 0.3], [1.4, 2.6], [2.2, -0.4], [3.7, 1.5]], dtype=torch.float64)
    grid = ((2 * cell + 1) / torch.tensor([4.0, 3.0]) - 1).reshape(1, 2, 2, 2).requires_grad_()
    texture = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    read = lambda *inputs: indexed_grid_sample(*inputs, padding_mode)  # noqa: E731
    assert torch.autograd.gradcheck(read, (texture, grid), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(read, (texture, grid))


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
@pytest.mark.parametrize(('old', 'new'), [((37, 20), (8, 8)), ((5, 9), (8, 3)), ((1, 1), (4, 2)), ((6, 6), (6, 6))])
def test_multiplied_resizing_is_interpolation(mode, old, new):
    image = torch.randn(2, 3, *old)
    expected = gradients(lambda image: resize(image, list(new), mode), image)
    with deterministic():
        assert_all_close(gradients(lambda image: resize(image, list(new), mode), image), expected)


def test_gradcheck_multiplied_resizing():
    image = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: multiplied_resize(image, [3, 6], 'bicubic'), (image,))


@pytest.mark.parametrize('levels', [1, 2, 4])
def test_patches_are_the_same_also_at_positions_that_are_no_number(levels):
    image = torch.rand(2, 3, 33, 20)
    points = torch.rand(2, 5, 4, 4, 2) * 2.4 - 1.2
    points[0, 0, 0] = torch.tensor([float('nan'), 0.3])
    points[1, 2, 3] = torch.tensor([float('inf'), -float('inf')])
    footprint = torch.rand(2, 5) * 2**levels

    def sample(image, points):
        return sample_patches(mip_pyramid(image, levels), points, footprint)

    expected = gradients(sample, image, points)
    with deterministic():
        assert_all_close(gradients(sample, image, points), expected)
    assert all(each.isfinite().all() for each in expected)


@pytest.mark.parametrize('size', [(6, 9), (4, 3)])
def test_position_embeddings_are_the_same(size):
    centres = torch.rand(2, 11, 2) * 2.4 - 1.2

    def read(pos_embed, centres):
        return interpolate_pos_embed(resample_pos_embed(pos_embed, (4, 6), size, 1), centres, size, 1)

    pos_embed = torch.randn(1, 25, 8)
    expected = gradients(read, pos_embed, centres)
    with deterministic():
        assert_all_close(gradients(read, pos_embed, centres), expected)


def training_step(model, image):
    """Loss and gradients of every parameter."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = nn.functional.cross_entropy(model(image), torch.arange(len(image), device=image.device))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


# 'scale' at 4 patches of 96 px reads three mip levels and more; 9 patches resample the position embedding.
STEPS = [
    {'transform': 'scale', 'num_patches': 4},
    {'transform': 'projective', 'num_patches': 9, 'patch_drop_rate': 0.3},
    {'transform': 'tps', 'num_patches': 36},
]


@pytest.mark.parametrize('kwargs', STEPS, ids=lambda kwargs: kwargs['transform'])
@pytest.mark.parametrize('of_image', [False, True], ids=['', 'image'])
def test_no_operator_that_cuda_refuses_runs_in_a_training_step(kwargs, of_image):
    model = create(num_classes=5, depth=1, img_size=96, jitter=0.1, **kwargs).train()
    image = torch.randn(3, 3, 96, 96, requires_grad=of_image)
    with Operators() as operators:
        expected = training_step(model, image)
    assert 'grid_sampler_2d_backward' in operators.refused
    gradient, image.grad = image.grad, None
    with deterministic(), Operators() as operators:
        actual = training_step(model, image)
    assert operators.refused == []
    # In another order: a few samples lie within rounding of a texel's edge, where a bilinear read's gradient jumps.
    pairs = [*zip(actual, expected, strict=True), *([(image.grad, gradient)] if of_image else [])]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm() + 1e-6
    with deterministic():
        for again, first in zip(training_step(model, image), actual, strict=True):
            assert torch.equal(again, first)


@pytest.mark.parametrize('localizer', ['glance', 'saliency'])
def test_no_operator_that_cuda_refuses_runs_in_what_looks(localizer):
    model = create(num_patches=16, localizer=localizer)
    randomise(model.patch_embed.patching, std=0.2)
    image, results = torch.randn(2, 3, 40, 64), []
    for mode in (False, True):
        with deterministic(mode), Operators() as operators:
            model.zero_grad()
            logits = model(image)
            logits.square().mean().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert (operators.refused == []) == mode
    assert_all_close(results[1], results[0], 1e-4)


class Copied(TorchFunctionMode):
    """Notes what makes a tensor of Python's numbers, which on CUDA waits for the CPU and cannot be captured."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ('tensor', 'as_tensor', 'new_tensor', 'from_numpy', 'item', 'tolist', '__bool__'):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('localizer', ['cnn', 'glance', 'saliency'])
def test_a_forward_copies_nothing_to_the_device_and_waits_for_nothing(localizer):
    model, image = create(num_classes=3, depth=2, num_patches=16, localizer=localizer), torch.randn(2, 3, 96, 96)
    randomise(model)
    with Copied() as copied:
        model(image)
        model.train()(image)
    assert copied.names == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_training_on_cuda_is_repeatable(transform, monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    model = create(num_classes=5, depth=2, img_size=96, num_patches=9, jitter=0.1, transform=transform).train()
    model, image = model.cuda(), torch.randn(4, 3, 96, 96, device='cuda', requires_grad=True)
    expected = training_step(model, image)
    with deterministic():
        steps = [training_step(model, image) for _ in range(3)]
    for ours, theirs in zip(steps[0], expected, strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm() + 1e-5
    for step in steps[1:]:
        for again, first in zip(step, steps[0], strict=True):
            assert torch.equal(again, first)


def test_warning_only_suffices():
    model, image = create(num_classes=3, depth=1, num_patches=4), torch.randn(1, 3, 48, 48)
    expected = model(image)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_vit_itself_runs_nothing_that_cuda_refuses():
    with deterministic(), Operators() as operators:
        training_step(timm.create_model('test_vit', num_classes=5), torch.randn(2, 3, 160, 160))
    assert operators.refused == []
