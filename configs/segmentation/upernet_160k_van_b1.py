# UPerNet, 160k, van_b1: published mIoU 44.9.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b1", pretrained=True, drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
