"""Low-rank adapters of PEFT, with the localisation network and the classifier trained in full."""

import pytest
import timm
import torch
from conftest import assert_equal_up_to_rounding, learn, relative
from torch.nn.functional import cross_entropy

import timm_apvit

peft = pytest.importorskip('peft', minversion='0.14')

BLOCKS = r'blocks\.\d+\.attn\.(qkv|proj)'
IN_FULL = ['head', 'patching', 'geometry_embed']


def base(**kwargs):
    """The same model each time."""
    torch.manual_seed(0)
    return timm.create_model('test_apvit', img_size=64, num_classes=3, num_patches=6, **kwargs)


def images(number=12):
    """Images ``(B, 3, 64, 64)`` of 3 classes, each of a brightness of its own, and their labels ``(B,)``."""
    labels = torch.arange(number) % 3
    noise = torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return noise + labels[:, None, None, None] - 1.0, labels


@pytest.fixture(scope='module', params=[{}, {'transform': 'affine', 'localizer': 'glance'}], ids=['default', 'all'])
def trained(request):
    """An adapted model after a few steps, its losses, and the arguments of its base."""
    model = peft.get_peft_model(
        base(**request.param), peft.LoraConfig(r=4, target_modules=BLOCKS, modules_to_save=IN_FULL)
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    learns = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=5e-3, weight_decay=0)  # which would change what gets no gradient
    x, labels = images()
    losses = learn(optimizer, 8, lambda: cross_entropy(model(x), labels))
    return model.eval(), before, losses, request.param


def test_adapters_and_what_is_to_be_trained_in_full_learn_and_nothing_else(trained):
    model, before, losses, _ = trained
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    learns = {name for name in before if '.lora_' in name or '.modules_to_save.' in name}
    assert changed == learns
    assert {name.partition('.modules_to_save.')[0].rpartition('.')[2] for name in changed if '.lora_' not in name} == {
        *IN_FULL
    }
    assert sum('.lora_' in name for name in changed) == 2 * 2 * 6


def test_saved_and_loaded_it_gives_the_same_logits(trained, tmp_path):
    model, _, _, kwargs = trained
    x, _ = images()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(**kwargs), tmp_path).eval()
    assert_equal_up_to_rounding(again(x), model(x))
    assert relative(base(**kwargs).eval()(x) - model(x), model(x)) > 0.1


def test_merged_it_is_an_apvit_that_timm_loads(trained, tmp_path):
    model, _, _, kwargs = trained
    x, _ = images()
    model.save_pretrained(tmp_path / 'adapter')
    merged = peft.PeftModel.from_pretrained(base(**kwargs), tmp_path / 'adapter').merge_and_unload()
    timm_apvit.save_pretrained(merged, tmp_path / 'merged')
    loaded = timm.create_model(f'local-dir:{tmp_path / "merged"}', pretrained=True).eval()
    assert_equal_up_to_rounding(loaded(x), model(x))
    assert loaded.num_patches == 6


def test_number_of_patches_of_an_adapted_model_may_change(trained):
    model, _, _, _ = trained
    x, _ = images(2)
    try:
        model.set_num_patches(11)
        assert model.forward_features(x).shape == (2, 1 + 11, 64)
    finally:
        model.set_num_patches(6)


def test_adapters_of_the_projection_of_patches_count_too():
    x, _ = images(4)
    config = peft.LoraConfig(r=4, target_modules=['qkv', 'proj'], init_lora_weights=False)
    adapted = peft.get_peft_model(base().eval(), config)
    (projection,) = (module for name, module in adapted.named_modules() if name.endswith('patch_embed.proj'))
    expected = adapted(x)
    expected.square().sum().backward()
    assert projection.lora_A['default'].weight.grad.abs().sum() > 0
    assert_equal_up_to_rounding(adapted.merge_and_unload()(x), expected)
