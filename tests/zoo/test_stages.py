"""zoo.stages: shapes, parameters and multiply-accumulates against values worked out by hand."""

import pytest
import timm
import torch
from torch import nn

from zoo.stages import StageRow, stage_table


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 2, stride=2, bias=False))
        self.dropout = nn.Dropout()
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.dropout(self.stages(self.stem(x * self.scale))).mean((2, 3)))


def test_by_hand():
    model = Tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert stage_table(model, (32, 48)) == [
        StageRow("stem", (8, 8, 12), 3 * 8 * 16 + 8, 3 * 8 * 16 * 96),
        StageRow("stages.0", (8, 8, 12), 8 * 9 + 8, 8 * 9 * 96),
        StageRow("stages.1", (16, 4, 6), 8 * 16 * 4, 8 * 16 * 4 * 24),
        StageRow("head", (10,), 170, 160),
        StageRow("total", (10,), 1 + 392 + 80 + 512 + 170, 36864 + 6912 + 12288 + 160),
    ]
    assert model.training and model.stem.weight.device.type == "cpu"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_channels():
    model = Tiny()
    model.stem = nn.Conv2d(1, 8, 4, stride=4)
    assert stage_table(model, (32, 32), in_chans=1)[0].macs == 8 * 16 * 64


def test_published_costs():
    assert stage_table(timm.create_model("resnet18"), (224, 224))[-1] == StageRow(
        "total", (1000,), 11689512, 1814073344
    )
    rows = {row.name: row for row in stage_table(timm.create_model("vit_tiny_patch16_224"), (224, 224))}
    tokens, dim = 197, 192
    block = 12 * tokens * dim * dim + 2 * tokens * tokens * dim
    assert rows["blocks"].macs == 12 * block and rows["blocks"].shape == (tokens, dim)
    assert rows["total"].params == 5717416


def test_a_size_that_a_model_does_not_take():
    with pytest.raises(ValueError, match=r"VisionTransformer does not take 3x225x224 pictures: .*225.*\.$"):
        stage_table(timm.create_model("vit_tiny_patch16_224"), (225, 224))
