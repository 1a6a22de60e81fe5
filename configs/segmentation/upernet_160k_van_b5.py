# UPerNet, 160k, van_b5: published mIoU from ImageNet-22k 53.9.
# No weights are at hand by name: set checkpoint, or it begins from scratch.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b5", pretrained=False, drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 480, 768]),
    auxiliary_head=dict(in_channels=480),
)
