# Semantic FPN, 80k, ravlt_small: published mIoU 49.5.
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_small", pretrained=True, drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
