# UPerNet, 160k, van_b4: published mIoU 52.2, from ImageNet-22k 53.5.
# No weights are at hand by name: set checkpoint, or it begins from scratch.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b4", pretrained=False, drop_path_rate=0.4),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
