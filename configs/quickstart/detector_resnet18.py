# The same with timm's ResNet-18, to compare.
_base_ = "detector_van_nano.py"
model = dict(
    backbone=dict(_delete_=True, type="ZooBackbone", model_name="resnet18", pretrained=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
