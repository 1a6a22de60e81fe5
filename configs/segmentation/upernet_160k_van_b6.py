# UPerNet, 160k, van_b6: published mIoU from ImageNet-22k 54.7.
# No weights are at hand by name: set checkpoint, or it begins from scratch.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b6", pretrained=False, drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
