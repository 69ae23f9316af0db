"""Detectors of torchvision on our pyramids."""

import pytest
import torch
from conftest import learn

import timm_apvit

detection = pytest.importorskip('torchvision.models.detection')
ops = pytest.importorskip('torchvision.ops')
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402

SIZE = 96


def detector(kind, **kwargs):
    """A detector on the pyramid of an APViT."""
    backbone = timm_apvit.pyramid(
        'test_apvit', img_size=SIZE, strides=(8, 16, 32), out_channels=32, feature_cls='dict', **kwargs
    )
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    arguments = {'num_classes': 2, 'min_size': SIZE, 'max_size': SIZE}
    if kind in ('RetinaNet', 'FCOS'):
        return getattr(detection, kind)(backbone, anchor_generator=anchors, **arguments)
    pool = ops.MultiScaleRoIAlign(['0', '1', '2'], output_size=4, sampling_ratio=2)
    arguments |= {'rpn_anchor_generator': anchors, 'box_roi_pool': pool}
    if kind == 'MaskRCNN':
        arguments['mask_roi_pool'] = pool
    return getattr(detection, kind)(backbone, **arguments)


def squares(number=4):
    """Images with a bright square of half their side, and its box (x0, y0, x1, y1), in pixels."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for y, x in torch.randint(0, SIZE // 2, (number, 2), generator=generator).tolist():
        image = 0.1 * torch.rand(3, SIZE, SIZE, generator=generator)
        image[:, y : y + SIZE // 2, x : x + SIZE // 2] = 1.0
        images.append(image)
        boxes = torch.tensor([[x, y, x + SIZE // 2, y + SIZE // 2]], dtype=torch.float32)
        masks = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
        masks[:, y : y + SIZE // 2, x : x + SIZE // 2] = 1
        targets.append({'boxes': boxes, 'labels': torch.tensor([1]), 'masks': masks})
    return images, targets


@pytest.mark.parametrize('kind', ['FasterRCNN', 'RetinaNet', 'MaskRCNN', 'FCOS'])
@pytest.mark.parametrize('num_patches', [pytest.param(None, marks=pytest.mark.slow), 10])
def test_detector_learns_to_find_squares(kind, num_patches, tmp_path):
    model = detector(kind, num_patches=num_patches)
    images, targets = squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = learn(optimizer, 18, lambda: sum(model(images, targets).values()))
    assert losses[-1] < 0.8 * losses[0]
    fields = model.backbone.vit.patch_embed.patching.localizer.fields
    assert all(parameter.grad.abs().sum() > 0 for parameter in fields.parameters())
    found = model.eval()(images)
    expected = {'boxes', 'labels', 'scores'} | ({'masks'} if kind == 'MaskRCNN' else set())
    assert [set(each) for each in found] == [expected] * len(images)
    torch.save(model.state_dict(), tmp_path / 'state.pt')
    again = detector(kind, num_patches=num_patches).eval()
    again.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    for ours, theirs in zip(found, again(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
