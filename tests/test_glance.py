"""Where a glance by the ViT's own blocks looks, what it answers, and what teaches it."""

import copy
import math
from functools import partial

import pytest
import timm
import timm.optim
import torch
from conftest import create, randomise
from hidden import CLASSES, UPDATES, assert_finds, hidden_patterns, small_model
from timm.task import ClassificationTask
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import timm_apvit
from timm_apvit import AdaptivePatching, fit_glance
from timm_apvit.learning.glance import collapsed

FAMILIES = (
    'test_apvit',
    'apvit_tiny_patch16_224',
    'apvit_deit_tiny_distilled_patch16_224',
    'apvit_small_patch16_dinov3',
    'apvit_small_patch16_rope_mixed_224',
    'apvit_so150m_patch16_reg4_gap_256',
)

PIXELS, LABELS = torch.rand(2, 3, 32, 32), torch.zeros(2).long()


def nan_at_last(answers, labels, factors=iter((1.0, math.nan))):  # noqa: B008
    """A loss that is a number once."""
    return cross_entropy(answers, labels) * next(factors)


def update(model, loss, steps=1, lr=1e-3):
    """Train a model in a plain loop, with the loss of its outputs and of targets."""
    images, labels, _ = hidden_patterns(512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        value = loss(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_new_model_is_the_vit(name, training):
    model = timm.create_model(name, depth=2, num_classes=5, localizer={'name': 'glance', 'grid': 3, 'blocks': 1})
    randomise(model.blocks, std=0.04)
    vit = timm_apvit.vit_of(model).train(training)
    image = torch.randn(2, *model.default_cfg['input_size'])
    with torch.no_grad():
        ours, theirs = model.train(training)(image), vit(image)
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.std())
    assert theirs.std() > 0


def test_a_plain_loop_finds_what_a_fixed_grid_does_not_see():
    model = small_model()
    update(model, cross_entropy, UPDATES)
    assert_finds(model)
    images, labels, _ = hidden_patterns(100, seed=1)
    fixed = small_model('cnn', max_shift=0.0, max_zoom=1.0)
    update(fixed, cross_entropy, UPDATES)
    with torch.no_grad():
        assert (fixed.eval()(images).argmax(dim=1) == labels).float().mean() < 0.7


@pytest.mark.slow
def test_timms_training_task_teaches_it():
    model = small_model()
    task = ClassificationTask(model, criterion_kwargs={'smoothing': 0.1}, verbose=False)
    images, labels, _ = hidden_patterns(512)
    optimizer = timm.optim.create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    for _ in range(UPDATES):
        chosen = torch.randint(len(images), (32,))
        loss = task(images[chosen], labels[chosen])['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_finds(model)


def one_hot(outputs, labels):
    return binary_cross_entropy_with_logits(outputs, torch.nn.functional.one_hot(labels, CLASSES).float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ('loss', 'classes'),
    [(one_hot, CLASSES), (lambda outputs, labels: mse_loss(outputs.squeeze(1), labels.float()), 1)],
    ids=['multi-label', 'regression'],
)
def test_other_losses_train_it(loss, classes):
    model = small_model(num_classes=classes)
    update(model, loss, 300, lr=2e-3)
    images, labels, _ = hidden_patterns(100, seed=1)
    with torch.no_grad():
        outputs = model.eval()(images)
    named = outputs.argmax(dim=1) if classes == CLASSES else outputs[:, 0].round()
    assert (named == labels).float().mean() > 0.4  # by chance a sixth


@pytest.mark.slow
def test_features_without_a_classifier_teach_it_too():
    model, head = small_model(num_classes=0), torch.nn.Linear(64, CLASSES)
    update(torch.nn.Sequential(model, head), cross_entropy, 200, lr=2e-3)
    assert_finds(model, named=False)


@pytest.mark.slow
def test_fitted_first_it_finds_before_the_vit_learns():
    model = small_model()
    # Blocks that see something, as pretrained ones do.
    update(model, cross_entropy, 40)
    with torch.no_grad():
        for layer in (model.patch_embed.patching.localizer.score, *model.patch_embed.patching.localizer.classes):
            layer.weight.zero_()
    model.reset_classifier(CLASSES)
    model.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels, _ = hidden_patterns(256)
    loss = fit_glance(model, zip(images.split(64), labels.split(64), strict=True), epochs=20, lr=5e-3)
    assert loss < 0.3
    assert_finds(model, named=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    read = ('norm.', 'evidence.', 'score.', 'classes.')
    assert changed <= {n for n in before if n.startswith(tuple(f'patch_embed.patching.localizer.{r}' for r in read))}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_its_answer_is_added_to_the_vits_and_dropped_for_some_images_in_training():
    model = randomise(create(num_classes=5, num_patches=9, localizer='glance'), std=0.1)
    image = torch.randn(40, 3, 64, 64)
    patches = model.patch_embed(image)
    with torch.no_grad():
        alone = model.forward_head(model.forward_features(patches))
        torch.testing.assert_close(model(patches), alone + patches.geometry.logits)
    answers = model.train().patch_embed(image).geometry.logits
    dropped = (answers == 0).all(dim=1).float().mean()
    assert 0.2 < dropped < 0.8


def test_a_copy_glances_with_the_copied_vit_and_a_part_of_it_with_the_same():
    model = create(localizer='glance')
    twin = copy.deepcopy(model)
    assert twin.patch_embed.patching.localizer.vit is twin
    assert copy.deepcopy(model.patch_embed.patching).localizer.vit is model
    assert model not in list(model.patch_embed.patching.localizer.modules())


@pytest.mark.slow
def test_another_number_of_classes_keeps_where_it_looks(tmp_path):
    model = small_model()
    update(model, cross_entropy, 80)
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    image = hidden_patterns(4)[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(image), model.eval()(image))
    window = model.patch_geometry(image).window
    for number in (7, 0):
        other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=number).eval()
        torch.testing.assert_close(other.patch_geometry(image).window, window)
        assert other.patch_geometry(image).logits.abs().max() < 1e-5
        timm_apvit.save_pretrained(other, tmp_path / 'other')
        again = timm.create_model(f'local-dir:{tmp_path / "other"}', pretrained=True, num_classes=4)
        torch.testing.assert_close(again.eval().patch_geometry(image).window, window)
    for number in (3, 0, CLASSES):
        model.reset_classifier(number)
        torch.testing.assert_close(model.patch_geometry(image).window, window)
    assert model(image).shape == (4, CLASSES)
    model.load_state_dict(copy.deepcopy(model.state_dict()))


@pytest.mark.parametrize('size', [(3, 5), (1, 1), (64, 200)])
def test_any_image_and_a_single_patch(size):
    model = randomise(create(num_patches=1, num_classes=1, localizer='glance'), std=0.2)
    assert model(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.slow
def test_collapse_is_told():
    model, images = small_model(), hidden_patterns(16)[0]
    assert 'all images are seen whole' in collapsed(model, images)
    localizer = model.patch_embed.patching.localizer
    localizer.score.weight.data.normal_(std=100.0)
    assert 'the same place' in collapsed(model, images[:1].expand(16, -1, -1, -1))
    update(model := small_model(), cross_entropy, 60)
    assert collapsed(model, images) is None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'localizer': {'name': 'glance', 'blocks': 99}}, 'blocks of the glance to be at most'),
        ({'localizer': {'name': 'glance', 'blocks': 0}}, 'expected blocks to be an integer >= 1'),
        ({'localizer': {'name': 'glance', 'grid': 0}}, 'expected grid to be an integer from 1 to 64, got 0'),
        ({'localizer': {'name': 'glance', 'grid': None}}, 'expected grid to be an integer from 1 to 64, got None'),
        ({'localizer': {'name': 'glance', 'width': 2.5}}, 'expected width to be an integer >= 1, got 2.5'),
        ({'localizer': {'name': 'glance', 'max_focus': 0.5}}, 'expected max_focus to be a finite number'),
        ({'localizer': {'name': 'glance', 'answer_drop': 2}}, 'expected answer_drop to be a finite number'),
        ({'localizer': {'name': 'glance', 'classes': [3, -1]}}, 'expected classes to be numbers of classes >= 0'),
        ({'localizer': 'glance', 'patch_drop_rate': 0.5}, 'expected patch_drop_rate=0'),
        ({'max_focus': 5.0}, "expected localizer='glance' in the place of max_focus"),
    ],
)
def test_rejects_what_no_glance_can_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_apvit', **arguments)


def test_max_focus_of_a_model_that_had_none_is_left_out():
    assert 'max_focus' not in timm.create_model('test_apvit', max_focus=1.0).adaptive_args()


def test_rejects_a_glance_without_a_vit():
    with pytest.raises(ValueError, match='in a ViT of timm, whose blocks it reads'):
        AdaptivePatching(8, 9, localizer='glance')(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ('arguments', 'batches', 'options', 'message'),
    [
        ({'localizer': 'cnn'}, [(PIXELS, LABELS)], {}, "a model with localizer='glance', got one with a"),
        ({}, [], {}, 'expected batches of images, got none'),
        ({}, [], {'epochs': 0}, 'expected epochs to be an integer >= 1, got 0'),
        ({}, [(PIXELS.byte(), LABELS)], {}, 'expected a normalised floating-point image'),
        ({}, [(PIXELS[0], LABELS)], {}, r'expected an image of shape \(B, 3, H, W\), got \[3, 32, 32\]'),
        ({}, [{'image': PIXELS}], {}, 'expected batches of two tensors, images and targets, got dict'),
        ({}, [(PIXELS, [0, 1])], {}, 'expected batches of two tensors'),
        ({}, [(PIXELS, LABELS + 5)], {}, 'expected targets of the answers, got a loss of answers .* that fails'),
        ({}, [(PIXELS, LABELS)], {'loss': partial(cross_entropy, reduction='none')}, 'a loss that is a finite number'),
        ({}, [(PIXELS, LABELS)], {'loss': nan_at_last, 'epochs': 2}, 'a loss that is a finite number'),
        ({}, [(PIXELS / 0, LABELS)], {}, 'expected images and weights whose tokens are finite'),
        ({'num_classes': 0}, [(PIXELS, LABELS)], {}, 'expected a model with classes, or a loss of pooled features'),
    ],
)
def test_rejects_to_fit_what_cannot_be_and_learns_nothing(arguments, batches, options, message):
    model = create(**{'localizer': 'glance', 'num_classes': 2, **arguments})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_glance(model, batches, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_tokens_that_are_not_pooled_have_its_answer_too():
    model = randomise(create(num_classes=5, num_patches=9, localizer='glance', global_pool='token'), std=0.1)
    images = torch.randn(3, 3, 64, 64)
    pooled = model(images)
    model.global_pool = ''
    torch.testing.assert_close(model(images)[:, 0], pooled)


def test_early_features_without_the_blocks_that_it_reads_are_refused():
    glance = {'name': 'glance', 'blocks': 3}
    arguments = {'features_only': True, 'img_size': 64, 'localizer': glance}
    maps = timm.create_model('test_apvit', out_indices=(2,), **arguments)(torch.randn(1, 3, 64, 64))
    assert maps[0].shape == (1, 64, 4, 4)
    with pytest.raises(ValueError, match='expected features of block 2 or a later one'):
        timm.create_model('test_apvit', out_indices=(1,), **arguments)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_a_classifier_exchanged_by_hand_is_refused_and_dtypes_are_the_vits():
    model = create(num_classes=5, num_patches=9, localizer='glance')
    image = torch.randn(2, 3, 64, 64)
    assert copy.deepcopy(model).bfloat16()(image.bfloat16()).dtype == torch.bfloat16
    assert torch.jit.trace(model.eval(), image)(image).shape == (2, 5)
    model.head = torch.nn.Linear(64, 1)
    with pytest.raises(ValueError, match='expected 5 outputs of the classifier'):
        model(image)
