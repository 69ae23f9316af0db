"""Options: defaults that depend on others."""

from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.preparation import with_defaults


def test_embedded_defaults_give_way_to_model_kwargs():
    options = with_defaults(Options(model_kwargs={'transform': 'affine', 'img_size': 64}))
    assert options.transform is None
    assert options.img_size is None
    assert options.num_patches == ((4, 4),)
    assert options.model_kwargs['transform'] == 'affine'
    assert with_defaults(Options(transform='scale')).transform == 'scale'
