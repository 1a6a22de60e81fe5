# UPerNet, 160k, inline_swin_tiny: no published result.
# No weights are at hand by name: set checkpoint, or it begins from scratch.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="inline_swin_tiny", pretrained=False, drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
