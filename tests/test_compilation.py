"""``torch.compile``: one graph without breaks for each number of patches, whatever the batch and the step."""

import pytest
import torch
from conftest import create, randomise
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.slow

KWARGS = {'num_classes': 5, 'depth': 1, 'img_size': 96, 'num_patches': 9}


@pytest.fixture
def counter():
    """A backend that counts graphs and runs them as they are."""
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


def compiled(model, counter):
    return torch.compile(model, backend=counter, fullgraph=True, dynamic=True)


# Of a bound in float arithmetic that is that of no other family, too.
@pytest.mark.parametrize('transform', ['projective', 'tps'])
def test_one_graph_serves_every_batch_size_and_training_step_and_gives_what_eager_gives(counter, transform):
    models = [create(transform=transform, jitter=0.1, **KWARGS).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    forwards = models[0], compiled(models[1], counter)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01) for model in models]
    for batch in (2, 3, 5, 4):
        image, label, outputs = torch.randn(batch, 3, 96, 96), torch.arange(batch), []
        for forward, optimizer in zip(forwards, optimizers, strict=True):
            torch.manual_seed(batch)  # of the jitter
            outputs.append(forward(image))
            optimizer.zero_grad()
            cross_entropy(outputs[-1], label).backward()
            optimizer.step()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_each_number_of_patches_compiles_once(counter):
    model = create(jitter=0.1, **KWARGS).train()
    forward = compiled(model, counter)
    counts = []
    for num in (9, 7, 9, 7, 9):
        model.set_num_patches(num)
        for batch in (2, 3):
            image, outputs = torch.randn(batch, 3, 96, 96), []
            for each in (forward, model):
                torch.manual_seed(num)
                outputs.append(each(image))
            torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.parametrize('localizer', ['glance', 'saliency'])
def test_what_looks_autocast_and_deterministic_algorithms_compile_into_a_graph_each(counter, localizer):
    patching, image = create(num_patches=4, localizer=localizer).patch_embed.patching, torch.randn(2, 3, 48, 48)
    randomise(patching, std=0.2)
    forward = torch.compile(patching, backend=counter, fullgraph=True)
    expected = patching(image)[0]
    torch.testing.assert_close(forward(image)[0], expected, rtol=0, atol=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        rounded = patching(image)[0]  # a glance is at the image in bfloat16
        for _ in range(2):
            torch.testing.assert_close(forward(image)[0], rounded, rtol=0, atol=1e-4)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.testing.assert_close(forward(image)[0], expected, rtol=0, atol=1e-4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counter.frame_count == 3


def test_image_sizes_that_divide_into_as_many_mip_levels_share_a_graph(counter):
    model = create(**KWARGS)
    forward = compiled(model, counter)
    for size in ((96, 128), (64, 112), (80, 96)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(forward(image), model(image), rtol=0, atol=1e-5)
    assert counter.frame_count == 1
