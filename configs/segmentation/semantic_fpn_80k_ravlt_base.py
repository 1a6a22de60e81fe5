# Semantic FPN, 80k, ravlt_base: published mIoU 51.9.
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_base", pretrained=True, drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
