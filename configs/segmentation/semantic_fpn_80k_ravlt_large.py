# Semantic FPN, 80k, ravlt_large: published mIoU 52.6.
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_large", pretrained=True, drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
