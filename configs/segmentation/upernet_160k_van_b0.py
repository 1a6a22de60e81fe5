# UPerNet, 160k, van_b0: published mIoU 41.1.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b0", pretrained=True, drop_path_rate=0.1),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
    auxiliary_head=dict(in_channels=160),
)
