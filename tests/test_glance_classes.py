"""A glance that learnt to tell other classes before: what it keeps, and what starts anew."""

import timm
import torch
from conftest import create

import timm_apvit


def learnt(model):
    """The model, with a glance that says something."""
    torch.nn.init.normal_(model.patch_embed.patching.localizer.classes[-1].weight)
    return model


def test_many_numbers_of_classes_one_after_the_other_come_back(tmp_path):
    model = learnt(create(num_classes=2, localizer='glance'))
    for number in range(3, 14):
        model.reset_classifier(number)
        learnt(model)
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(image), model.eval()(image))
    with torch.device('meta'):
        empty = create(num_classes=13, localizer='glance')
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.eval()(image), model(image))


def test_what_was_never_learnt_is_not_kept(tmp_path):
    model = create(num_classes=5, localizer='glance')
    model.reset_classifier(3)
    assert model.adaptive_args()['localizer'] == 'glance'
    timm_apvit.save_pretrained(learnt(model), tmp_path)
    untrained = timm.create_model(f'local-dir:{tmp_path}', pretrained=False)
    untrained.reset_classifier(4)
    timm_apvit.save_pretrained(untrained, tmp_path / 'other')
    assert untrained.adaptive_args()['localizer'] == {'name': 'glance'}


def test_loading_keeps_parameters_that_fit_and_its_own_last_classifier():
    model = learnt(create(num_classes=5, localizer='glance'))
    weights = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith('head.')}
    model.reset_classifier(3)
    localizer = learnt(model).patch_embed.patching.localizer
    before, values = localizer.classes[-1].weight, localizer.classes[-1].weight.clone()
    model.load_state_dict(weights, strict=False)
    assert localizer.classes[-1].weight is before
    assert torch.equal(before, values)


def test_as_many_classes_as_features_start_anew(tmp_path):
    timm_apvit.save_pretrained(learnt(create(num_classes=0, localizer='glance')), tmp_path)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=64)
    assert model.patch_embed.patching.localizer.told == [0, 64]
    assert not model.patch_embed.patching.localizer.knows_classes
