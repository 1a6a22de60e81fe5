# UPerNet, 160k, slab_swin_tiny: no published result.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="slab_swin_tiny", pretrained=True, drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
