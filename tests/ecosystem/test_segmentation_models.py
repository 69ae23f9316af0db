"""Decoders of segmentation_models_pytorch on our models: those that take ViTs."""

import pytest
import torch
from conftest import learn, move_patches
from torch.nn.functional import binary_cross_entropy_with_logits

smp = pytest.importorskip('segmentation_models_pytorch', minversion='0.5')


def squares(number=4, size=64):
    """Images ``(B, 3, H, W)`` with a bright square, and where it is: ``(B, 1, H, W)``."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(number, 1, size, size)
    for mask, (y, x) in zip(masks, torch.randint(0, size // 2, (number, 2), generator=generator), strict=True):
        mask[:, y : y + size // 2, x : x + size // 2] = 1
    return masks * 2 + 0.3 * torch.randn(number, 3, size, size, generator=generator), masks


def learn_masks(model, x, masks, steps, lr):
    """Train a model on a batch; its losses, and an error where its masks are of another size."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return learn(optimizer, steps, lambda: binary_cross_entropy_with_logits(model(x), masks))


@pytest.mark.parametrize('num_patches', [None, 9])
def test_dpt_learns_to_segment(num_patches):
    small = {'decoder_intermediate_channels': (16, 16, 16, 16), 'decoder_fusion_channels': 16}
    model = smp.DPT('tu-test_apvit', encoder_weights=None, num_patches=num_patches, img_size=64, **small)
    move_patches(model, std=0.1)
    first, *_, last = learn_masks(model, *squares(), steps=14, lr=3e-3)
    assert last < 0.6 * first
    localizer = model.encoder.model.patch_embed.patching.localizer
    assert all(parameter.grad.abs().sum() > 0 for parameter in localizer.parameters())


@pytest.mark.parametrize('encoder', [pytest.param('test_vit', marks=pytest.mark.slow), 'test_apvit'])
@pytest.mark.parametrize('decoder', ['Unet', 'FPN', 'Segformer', 'UPerNet'])
def test_pyramid_decoders_learn_and_come_back(decoder, encoder, tmp_path):
    arguments = {'num_patches': 9, 'img_size': 64} if encoder == 'test_apvit' else {}

    def create():
        return getattr(smp, decoder)(f'tu-pyramid.{encoder}', encoder_weights=None, out_channels=32, **arguments)

    model = create()
    if encoder == 'test_apvit':
        move_patches(model, std=0.1)
    x, masks = squares()
    first, *_, last = learn_masks(model, x, masks, steps=10, lr=2e-3)
    assert last < 0.7 * first
    assert all(p.grad is not None for p in model.encoder.parameters())
    model.eval()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / 'state.pt')
    again = create().eval()
    again.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(smp.from_pretrained(tmp_path).eval()(x), model(x), rtol=0, atol=0)
