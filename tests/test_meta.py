"""Models built without memory: on the meta device, then filled."""

import pytest
import timm
import torch
from conftest import create

from timm_apvit import TRANSFORMS

IMAGE = (2, 3, 50, 70)


def on_meta(name='test_apvit', **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


FAMILIES = (
    'apvit_large',
    'apvit_small_patch14_reg4_dinov2',
    'apvit_so400m_patch14_siglip_384',
    'apvit_7b_patch16_dinov3',
)


@pytest.mark.parametrize('name', [*FAMILIES, 'apvit_base_patch16_rope_mixed_ape_224', 'apvit_deit3_huge_patch14_224'])
def test_every_family_is_built_and_runs_by_shape_alone(name):
    model = on_meta(name, num_patches=(5, 7), transform='tps', localizer='glance')
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert not list(model.patch_embed.buffers())
    out = model.train()(torch.empty(IMAGE, device='meta'))
    assert (out.shape, out.device.type) == ((2, model.num_classes or model.num_features), 'meta')
    out.sum().backward()


@pytest.mark.parametrize('assign', [False, True], ids=['to_empty', 'assign'])
@pytest.mark.parametrize(('transform', 'localizer'), [*((each, 'glance') for each in TRANSFORMS), ('tps', 'saliency')])
def test_filled_from_a_state_it_is_the_model_of_that_state(transform, localizer, assign):
    kwargs = {'num_patches': 4, 'transform': transform, 'localizer': localizer}
    source, image = create(**kwargs), torch.randn(IMAGE)
    model = on_meta(**kwargs)
    if not assign:
        model.to_empty(device='cpu')
    model.load_state_dict(source.state_dict(), assign=assign)
    torch.testing.assert_close(model.eval()(image), source(image), rtol=0, atol=0)
    assert model.num_patches == 4


def test_initialised_after_to_empty_it_is_a_new_model():
    model = on_meta(num_patches=7).to_empty(device='cpu')
    for parameter in model.parameters():
        parameter.data.fill_(float('nan'))
    model.init_weights(needs_reset=True)
    image = torch.randn(IMAGE)
    assert model.eval()(image).isfinite().all()
    new = timm.create_model('test_apvit', num_patches=7).eval()
    for ours, theirs in zip(model.patch_geometry(image), new.patch_geometry(image), strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)
    for (name, ours), theirs in zip(model.named_parameters(), new.parameters(), strict=True):
        assert ours.std(correction=0).item() == pytest.approx(theirs.std(correction=0).item(), rel=0.3), name
