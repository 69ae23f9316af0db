"""Detectors of torchvision on our dense maps."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

detection = pytest.importorskip('torchvision.models.detection')
ops = pytest.importorskip('torchvision.ops')
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402

SIZE = 96


class Backbone(nn.Module):
    """Maps of an APViT at strides 8, 16 and 32, as in ViTDet: of the last block, up- and downsampled."""

    def __init__(self, out_channels=32, **kwargs):
        super().__init__()
        self.out_channels = out_channels
        self.body = timm.create_model('test_apvit', img_size=SIZE, features_only=True, out_indices=[-1], **kwargs)
        width = self.body.feature_info.channels()[-1]
        self.scales = nn.ModuleList([
            nn.ConvTranspose2d(width, out_channels, 2, 2),
            nn.Conv2d(width, out_channels, 1),
            nn.Conv2d(width, out_channels, 2, 2),
        ])  # fmt: skip

    def forward(self, x):
        (features,) = self.body(x)
        return OrderedDict((str(n), scale(features)) for n, scale in enumerate(self.scales))


def detector(kind, **kwargs):
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    size = {'min_size': SIZE, 'max_size': SIZE}
    if kind == 'RetinaNet':
        return detection.RetinaNet(Backbone(**kwargs), num_classes=2, anchor_generator=anchors, **size)
    pool = ops.MultiScaleRoIAlign(['0', '1', '2'], output_size=4, sampling_ratio=2)
    return detection.FasterRCNN(
        Backbone(**kwargs), num_classes=2, rpn_anchor_generator=anchors, box_roi_pool=pool, **size
    )


def squares(number=4):
    """Images with a bright square of half their side, and its box (x0, y0, x1, y1), in pixels."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for y, x in torch.randint(0, SIZE // 2, (number, 2), generator=generator).tolist():
        image = 0.1 * torch.rand(3, SIZE, SIZE, generator=generator)
        image[:, y : y + SIZE // 2, x : x + SIZE // 2] = 1.0
        images.append(image)
        boxes = torch.tensor([[x, y, x + SIZE // 2, y + SIZE // 2]], dtype=torch.float32)
        targets.append({'boxes': boxes, 'labels': torch.tensor([1])})
    return images, targets


@pytest.mark.parametrize('kind', ['FasterRCNN', 'RetinaNet'])
@pytest.mark.parametrize('num_patches', [None, 10])
def test_detector_learns_to_find_squares(kind, num_patches):
    model = detector(kind, num_patches=num_patches)
    images, targets = squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(18):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    fields = model.backbone.body.model.patch_embed.patching.localizer.fields
    assert all(parameter.grad.abs().sum() > 0 for parameter in fields.parameters())
    found = model.eval()(images)
    assert [set(each) for each in found] == [{'boxes', 'labels', 'scores'}] * len(images)
