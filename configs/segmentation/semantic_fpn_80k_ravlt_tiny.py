# Semantic FPN, 80k, ravlt_tiny: published mIoU 47.9.
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_tiny", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
