"""Patches on those cells of a fine grid that a glance chooses."""

import pytest
import timm
import torch
from conftest import create, randomise
from torch import nn

import timm_apvit
from timm_apvit import Localizer, Look, register_localizer
from timm_apvit.learning.adaptation import adaptation
from timm_apvit.learning.glance import collapsed
from timm_apvit.learning.saliency import saliency_loss
from timm_apvit.models.glance import resized
from timm_apvit.patching.anchors import Layout, Rows, resolve_layout

CPU = torch.device('cpu')
COARSE_FINE = {'name': 'coarse_fine', 'coarse': 4, 'fine': [3, 3], 'coarse_motion': 0.0}
SELECTING = {'localizer': {'name': 'glance', 'select': 6, 'grid': 4}, 'num_patches': COARSE_FINE, 'img_size': 96}


def test_anchors_that_may_move_take_the_best_cells_in_their_order():
    layout = resolve_layout(COARSE_FINE, (1, 1))
    worth = torch.randn(2, 5, 7)
    movable = layout.movable((5, 7))
    anchors = layout.anchors(CPU)
    chosen = anchors.on_best(worth, movable)
    assert movable == list(range(4, 13))
    cells = Rows(35, 5).anchors(CPU).centres
    for image in range(2):
        best = worth[image].flatten().argsort(descending=True)[:9].sort().values
        torch.testing.assert_close(chosen.centres[image, 4:], cells[best])
        torch.testing.assert_close(chosen.centres[image, :4], anchors.centres[:4])
    torch.testing.assert_close(chosen.extents[:, 4:], torch.tensor([1 / 7, 1 / 5]).expand(2, 9, 2))
    torch.testing.assert_close(chosen.extents[0, :4], anchors.extents[:4])


def test_cells_of_equal_worth_are_taken_all_over_the_image():
    layout = Layout(Rows(49, 7))
    centres = layout.anchors(CPU).on_best(torch.zeros(1, 14, 14), layout.movable((14, 14))).centres[0]
    quarters = (centres > 0).long() @ torch.tensor([1, 2])
    assert torch.bincount(quarters).min() >= 10
    assert len(centres[:, 1].unique()) == len(centres[:, 0].unique()) == 14


@pytest.mark.parametrize('cells', [(2, 5), (9, 2), (2, 4)])
def test_rejects_a_grid_that_is_too_coarse(cells):
    with pytest.raises(ValueError, match=f'as fine as that of the 9 patches, got {cells[0]} x {cells[1]}'):
        resolve_layout(COARSE_FINE, (1, 1)).movable(cells)


@pytest.mark.parametrize('select', [0, (3, 0), 'all', (2, 3, 4)])
def test_rejects_a_grid_that_is_none(select):
    with pytest.raises(ValueError, match='select'):
        create(localizer={'name': 'glance', 'select': select})


def test_all_cells_are_the_fixed_grid():
    vit = timm.create_model('test_vit').eval()
    model = timm_apvit.adapt(vit, localizer={'name': 'glance', 'select': 10})
    x = torch.randn(2, 3, 160, 160)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), vit(x), rtol=0, atol=1e-5)


def test_patches_are_where_the_saliency_is_and_move_from_there():
    model = randomise(create(**SELECTING)).eval()
    geometry = model.patch_geometry(torch.randn(3, 3, 96, 96))
    worth = nn.functional.interpolate(geometry.saliency[:, None], (6, 6), mode='bilinear').flatten(1)
    cells = Rows(36, 6).anchors(CPU).centres[worth.topk(9).indices.sort().values]
    moved = (geometry.centres[:, 4:] - cells).abs()
    assert 0 < moved.max() <= 2 / 6  # max_shift of 1, in cells
    assert (geometry.centres[:, :4] - resolve_layout(COARSE_FINE, (1, 1)).anchors(CPU).centres[:4]).abs().max() < 1e-6


class Constant(Localizer):
    """Cells of the left half are worth more by 3."""

    def __init__(self, fields, **_):
        super().__init__()
        self.widths = fields

    def level(self, image_size):
        return 0

    def look(self, pyramid):
        return Look(len(pyramid[0]), cells=3.0 * (torch.arange(8) < 4).float().expand(len(pyramid[0]), 8, 8))

    def forward(self, look, anchors):
        return {name: torch.zeros(look.memory, len(anchors.motion), n) for name, n in self.widths.items()}


@pytest.fixture
def constant():
    register_localizer('constant', Constant)


def test_in_training_cells_are_drawn_by_their_worth_and_some_images_seen_whole(constant):
    model = create(localizer='constant', num_patches=1, whole_share=0.0)
    x = torch.randn(400, 3, 32, 32)
    left = (model.train().patch_geometry(x).centres[:, 0, 0] < 0).float().mean()
    assert left == pytest.approx(torch.tensor(3.0).sigmoid().item(), abs=0.04)
    assert (model.eval().patch_geometry(x).centres[:, 0, 0] < 0).all()
    whole = create(localizer='constant', num_patches=4, whole_share=0.5).train().patch_geometry(x)
    anchors = Rows(4, 2).anchors(CPU).centres
    assert (whole.centres == anchors).all(dim=-1).all(dim=-1).float().mean() == pytest.approx(0.5, abs=0.1)
    still = create(localizer='constant', num_patches=4, window_jitter=0.0, whole_share=0.0).train()
    assert torch.equal(still.patch_geometry(x).centres, still.eval().patch_geometry(x).centres)


def places(number, seed):
    """Images ``(B, 3, 96, 96)`` with two small bright squares, and where they are, ``(B, 12, 12)``."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(number, 12, 12)
    for each in target:
        for y, x in torch.randint(0, 11, (2, 2), generator=generator).tolist():
            each[y : y + 2, x : x + 2] = 1
    bright = target.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    return 2 * bright + 0.5 * torch.randn(number, 3, 96, 96, generator=generator), target


def test_masks_teach_a_glance_to_find_several_things():
    arguments = {**SELECTING, 'localizer': {'name': 'glance', 'select': 12, 'grid': 12}}
    model = timm.create_model('test_apvit', **arguments).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, targets = places(256, 0)
    for x, target in zip(images.split(32) * 3, targets.split(32) * 3, strict=True):
        optimizer.zero_grad()
        saliency_loss(model.patch_geometry(x), target).backward()
        optimizer.step()
    images, targets = places(64, 1)
    centres = model.eval().patch_geometry(images).centres[:, 4:]
    index = ((centres + 1) * 6).long()
    found = torch.zeros_like(targets)
    found[torch.arange(64)[:, None], index[..., 1], index[..., 0]] = 1
    share = (found * targets).sum() / targets.sum()
    assert share > 0.95  # by chance 9 of 144 cells: 0.06


@pytest.mark.parametrize(
    'target', [torch.ones(2, 4), torch.ones(3, 4, 4), torch.ones(2, 4, 4) / 0, -torch.ones(2, 4, 4)]
)
def test_rejects_targets(target):
    geometry = create(**SELECTING).patch_geometry(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match='expected a target'):
        saliency_loss(geometry, target)


def test_images_without_things_teach_nothing():
    geometry = create(**SELECTING).patch_geometry(torch.randn(2, 3, 96, 96))
    target = torch.rand(2, 5, 7)
    alone = saliency_loss(geometry._replace(saliency=geometry.saliency[:1]), target[:1])
    target[1] = 0
    torch.testing.assert_close(saliency_loss(geometry, target), alone)
    assert saliency_loss(geometry, torch.zeros(2, 5, 7)) == 0


def test_a_grid_coarser_than_the_glance_misses_nothing():
    saliency = torch.zeros(1, 12, 12)
    saliency[0, 3, 3] = 9
    assert resized(saliency, (4, 4))[0, 1, 1] == 9
    assert resized(saliency, (24, 24)).max() > 5


def test_rejects_a_localizer_that_does_not_look(constant):
    geometry = create(localizer='constant').patch_geometry(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match='says where it looks'):
        saliency_loss(geometry, torch.ones(2, 4, 4))


def test_it_comes_back_compiles_and_exports(tmp_path):
    model = randomise(create(**SELECTING, num_classes=3)).eval()
    x = torch.randn(2, 3, 96, 96)
    timm_apvit.save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
    torch.testing.assert_close(program.module()(x[[0, 1, 0]]), model(x[[0, 1, 0]]))


def test_a_glance_that_finds_nothing_is_told():
    x = torch.randn(8, 3, 96, 96)
    model = timm.create_model('test_apvit', **SELECTING)
    assert collapsed(model, x) == 'The glance finds nothing yet: all cells matter alike.'
    assert collapsed(randomise(model), x) is None


def test_labels_alone_teach_it_and_it_is_measured():
    model = timm.create_model('test_apvit', **SELECTING, num_classes=2).train()
    x, labels = torch.randn(8, 3, 96, 96), torch.arange(8) % 2
    nn.functional.cross_entropy(model(x), labels).backward()
    assert model.patch_embed.patching.localizer.classes[-1].weight.grad.abs().sum() > 0
    loss = timm_apvit.fit_glance(model, [(x, labels)] * 2, epochs=2)
    assert loss < 1
    figures = adaptation(model.eval(), x)
    assert figures['patch_shift'] > 0
