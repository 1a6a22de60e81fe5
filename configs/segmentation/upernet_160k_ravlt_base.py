# UPerNet, 160k, ravlt_base: published mIoU 52.5.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_base", pretrained=True, drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)
