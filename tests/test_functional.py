"""What `torch.func` does with a model: calls with other parameters, gradients of each sample, ensembles."""

import pytest
import torch
from conftest import create, move_patches
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_apvit import TRANSFORMS

KWARGS = {'num_classes': 5, 'depth': 1, 'img_size': 96, 'num_patches': 9}

# Fused attention has no rule for vmap on CPU; the plain one has.
pytestmark = pytest.mark.usefixtures('_plain_attention')


@pytest.fixture
def _plain_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=['scale', 'projective', 'tps'])
def model(request):
    return create(transform=request.param, **KWARGS)


def of(model, parameters, image):
    return functional_call(model, parameters, (image,))


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_a_call_takes_parameters_from_outside(transform):
    model, other = (create(transform=transform, **KWARGS) for _ in range(2))
    image = torch.randn(2, 3, 96, 96)
    expected = model(image)
    assert torch.equal(of(model, dict(other.named_parameters()), image), other(image))
    assert torch.equal(model(image), expected)


def test_vmap_over_images(model):
    image = torch.randn(3, 3, 96, 96)
    actual = vmap(lambda each: model(each[None])[0])(image)
    torch.testing.assert_close(actual, model(image), rtol=0, atol=1e-5)


def test_vmap_over_models():
    models = [create(**KWARGS) for _ in range(3)]
    parameters, _ = stack_module_state(models)
    image = torch.randn(2, 3, 96, 96)
    actual = vmap(lambda each: of(models[0], each, image))(parameters)
    torch.testing.assert_close(actual, torch.stack([each(image) for each in models]), rtol=0, atol=1e-5)


def test_gradients_of_each_sample_add_up_to_those_of_the_batch(model):
    image, parameters = torch.randn(3, 3, 96, 96), {k: p.detach() for k, p in model.named_parameters()}
    each = vmap(grad(lambda p, x: of(model, p, x[None]).square().sum()), (None, 0))(parameters, image)
    model(image).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_jitter_under_vmap_is_refused_unless_it_says_how_random_it_is():
    model, image = create(jitter=0.5, **KWARGS).train(), torch.randn(1, 3, 96, 96).expand(2, -1, -1, -1)
    with pytest.raises(RuntimeError, match='randomness'):
        vmap(lambda each: model(each[None])[0])(image)
    apart = vmap(lambda each: model(each[None])[0], randomness='different')(image)
    alike = vmap(lambda each: model(each[None])[0], randomness='same')(image)
    assert not torch.allclose(apart[0], apart[1])
    torch.testing.assert_close(alike[0], alike[1])


def test_jvp_is_refused_by_name(model):
    image = torch.randn(1, 3, 96, 96)
    with pytest.raises(NotImplementedError, match='forward AD with grid_sampler_2d'):
        jvp(model, (image,), (torch.randn_like(image),))


def test_second_derivatives_are_the_same_with_deterministic_algorithms(model):
    model, image = move_patches(model, std=0.1).double(), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    parameters = [*model.patch_embed.patching.localizer.fields.parameters()]
    directions, results = [torch.randn_like(p) for p in parameters], []
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        try:
            first = torch.autograd.grad(model(image).square().sum(), parameters, create_graph=True)
            slope = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
            results.append(torch.autograd.grad(slope, parameters))
        finally:
            torch.use_deterministic_algorithms(False)
    for plain, deterministic in zip(*results, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(deterministic, plain, rtol=0, atol=1e-4 * plain.abs().max().item())
