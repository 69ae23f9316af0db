"""Bounds of a transform, and families of one's own."""

import inspect
import math

import pytest
import timm
import torch
from conftest import randomise, relative
from torch import Tensor

import timm_apvit
from timm_apvit import TRANSFORMS, AdaptivePatching, Bound, PatchTransform, register_transform
from timm_apvit.patching import transforms
from timm_apvit.patching.warps import perspective_stretch


class Keystone(PatchTransform):
    """Move, grow or shrink, and taper towards the top or the bottom."""

    fields = TRANSFORMS['scale'].fields | {'keystone': 1}
    own_bounds = {'max_keystone': Bound(0.3, high=0.9)}  # noqa: RUF012

    def warp(self, parameters: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        taper = self.bounds['max_keystone'] * torch.tanh(parameters['keystone'])
        return torch.cat([torch.zeros_like(taper), taper], dim=-1), None

    def warp_stretch(self, patch_aspect: float) -> float:
        return perspective_stretch(self.bounds['max_keystone'], patch_aspect)


@pytest.fixture
def keystone():
    register_transform('keystone', Keystone)


def test_a_family_of_ones_own_is_trained_saved_and_loaded(keystone, tmp_path):
    vit = randomise(timm.create_model('test_vit')).eval()
    model = timm.create_model('test_apvit', transform='keystone', max_keystone=0.2, max_zoom=3.0).eval()
    model.load_state_dict(vit.state_dict())
    image = torch.randn(2, 3, 160, 160)
    assert relative(model(image) - vit(image), vit(image)) <= 1e-4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'localizer.fields' in name:
                parameter.normal_(std=0.3)
    model(image).square().sum().backward()
    assert model.patch_embed.patching.localizer.fields['keystone'].weight.grad.abs().max() > 0
    expected = model(image)
    assert model.patch_geometry(image).perspective[..., 1].abs().max() > 0.1
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.adaptive_args() == model.adaptive_args()
    assert again.adaptive_args()['max_keystone'] == 0.2
    assert torch.equal(again(image), expected)


def test_a_checkpoint_with_bounds_of_its_own_may_change_its_family(keystone, tmp_path):
    wider = {'fields': Keystone.fields | {'rotation': 1}, '__module__': __name__}
    register_transform('turned', type('Turned', (PatchTransform,), wider))
    model = timm.create_model('test_apvit', transform='keystone', max_keystone=0.2, max_zoom=3.0)
    timm_apvit.save_pretrained(model, tmp_path)
    turned = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, transform='turned')
    assert turned.adaptive_args()['max_zoom'] == 3.0
    assert 'max_keystone' not in turned.adaptive_args()
    timm_apvit.save_pretrained(turned, tmp_path / 'again')
    assert 'max_keystone' not in (tmp_path / 'again/config.json').read_text()
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True, transform='affine')  # what it lacks does nothing
    torch.nn.init.ones_(model.patch_embed.patching.localizer.fields['keystone'].bias)
    timm_apvit.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r'unexpected keys: .*fields\.keystone'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, transform='affine')


def test_rejects_bounds_of_no_family(keystone):
    with pytest.raises(TypeError, match='max_keystones'):
        timm.create_model('test_apvit', transform='affine', max_keystones=0.2)
    with pytest.raises(TypeError, match=r'among max_shift, .*, max_warp, got max_keystone'):
        AdaptivePatching(transform='affine', max_keystone=0.2)
    with pytest.raises(ValueError, match=r'expected max_keystone to be a finite number within \[0.0, 0.9\], got 2'):
        timm.create_model('test_apvit', transform='keystone', max_keystone=2)


def own(**attributes):
    return type('Own', (PatchTransform,), attributes)


UNFIT_FIELDS = ('a.b', '', 'keys', 'training', 3)
# Arguments of the model, of timm's and of create_model, which a family would take away.
UNFIT_BOUNDS = (
    'depth', 'embed_dim', 'num_classes', 'jitter', 'drop_rate', 'in_chans', 'device', 'dtype', 'patch_size', 'self',
    'pretrained', 'pretrained_cfg', 'transform', 'num_patches', '', 'max_a b', 3,
)  # fmt: skip
UNFIT_RANGES = (0.3, (0.3, 0.0, 1.0), [0.3], Bound('a'), Bound(0.3, high='a'))


def test_no_argument_of_a_model_is_named_as_the_bounds_of_a_family_are():
    for owner in (timm.create_model, timm.models.build_model_with_cfg, timm.models.VisionTransformer.__init__):
        assert not [name for name in inspect.signature(owner).parameters if name.startswith(('max_', 'min_'))]
    assert not [name for name in inspect.signature(timm.models.eva.Eva).parameters if name.startswith(('max_', 'min_'))]


@pytest.mark.parametrize('bound', [name for name in transforms.BOUNDS if name != 'max_rotation'])
def test_gradients_at_the_ceiling_of_a_bound_are_finite(bound):
    ceiling = transforms.BOUNDS[bound].high
    for transform in ('affine', 'projective', 'tps'):
        patching = AdaptivePatching(4, 9, transform, **{bound: ceiling})
        for layer in patching.localizer.fields.values():
            torch.nn.init.normal_(layer.weight)
        patches, _ = patching(torch.randn(2, 3, 40, 60))
        patches.square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in patching.parameters())
        with pytest.raises(ValueError, match=f'expected {bound} to be a finite number within'):
            AdaptivePatching(4, 9, transform, **{bound: 1.01 * ceiling})


@pytest.mark.parametrize(
    ('name', 'family', 'message'),
    [
        ('own', torch.nn.Linear, 'expected a subclass of PatchTransform'),
        ('scale', Keystone, "expected a new name for Keystone, got 'scale' of Scale"),
        ('own', type('Own', (PatchTransform,), {'fields': {'scale': 1}}), "expected 'shift' among the fields of Own"),
        ('own', type('Own', (PatchTransform,), {'fields': {'shift': 2, 'warp': 3}}), "field 'warp' of width 32, got 3"),
        ('own', type('Own', (PatchTransform,), {'own_bounds': {'max_zoom': Bound(1.0)}}), 'families have, got max_z'),
        *((name, Keystone, 'expected a name such as my_transform for Keystone') for name in (3, None, '', 'a b', [])),
        *(('own', own(fields={'shift': 2, name: 1}), 'names that a module may have') for name in UNFIT_FIELDS),
        *(('own', own(fields={'shift': 2, 'new': width}), 'to have a width >= 1, got') for width in (-1, 0, 'a', 1.0)),
        *(('own', own(fields=fields), 'to be a dict of widths by name, got') for fields in (['shift'], None)),
        *(('own', own(own_bounds={name: Bound(1.0)}), r'named max_\.\.\. or min_\.\.\., got') for name in UNFIT_BOUNDS),
        *(('own', own(own_bounds={'max_own': bound}), 'to be a Bound of numbers') for bound in UNFIT_RANGES),
        ('own', own(own_bounds={'max_own': Bound(2.0, high=1.0)}), r'expected the default of max_own .*\], got 2\.0'),
        ('own', own(own_bounds={'max_focus': Bound(2.0)}), 'families have, got max_focus'),
        ('own', own(own_bounds=[Bound(1.0)]), 'to be a dict of Bound by name'),
    ],
)  # fmt: skip
def test_rejects_families_that_do_not_fit(keystone, name, family, message):
    with pytest.raises(ValueError, match=message):
        register_transform(name, family)


def test_registering_again_replaces(keystone):
    register_transform('keystone', Keystone)
    assert TRANSFORMS['keystone'] is Keystone


def test_rejects_unknown_transform_and_bounds_out_of_range():
    with pytest.raises(ValueError, match=r"one of translation, scale, .*got 'rotation'"):
        TRANSFORMS.named('rotation')
    for bound, bad in [
        ('max_shift', -0.1), ('max_zoom', 0.5), ('max_rotation', 181), ('max_shear', -1), ('max_shift', math.inf),
        ('max_zoom', math.nan), ('max_zoom', '2'), ('max_rotation', True), ('max_shift', [1]),
        ('max_perspective', 1.0), ('max_warp', -1),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f'expected {bound} to be a finite number within'):
            TRANSFORMS['affine'](**{bound: bad})
