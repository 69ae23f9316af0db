"""Training with accelerate: mixed precision, accumulated gradients, and a state that comes back."""

import pytest
import torch
from conftest import create
from hidden import EPOCHS, assert_finds, hidden_patterns, small_model
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy

import timm_apvit

accelerate = pytest.importorskip('accelerate', minversion='1.0')


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps its settings for the length of a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_steps_lower_the_loss_and_the_state_comes_back(precision, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = create(img_size=32, num_classes=3, num_patches=3).train()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, layer_decay=0.75)
    labels = torch.arange(12) % 3
    images = torch.randn(12, 3, 32, 32) + labels[:, None, None, None] - 1.0
    data = torch.utils.data.TensorDataset(images, labels)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=3))
    losses = []
    for _ in range(8):
        for each, label in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(each), label)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

    accelerator.save_state(tmp_path)
    before = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    expected = before(images)
    with torch.no_grad():
        before.head.weight.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(before(images), expected)
    assert isinstance(before, timm_apvit.APViT)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_a_loop_teaches_a_glance_where_to_look(precision):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = small_model()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    images, labels, _ = hidden_patterns(512)
    data = torch.utils.data.TensorDataset(images, labels)
    batches = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for _ in range(EPOCHS):
        for image, label in batches:
            accelerator.backward(cross_entropy(model(image), label))
            optimizer.step()
            optimizer.zero_grad()
    assert_finds(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
