# Mask2Former, 50e, ravlt_small: no published result.
_base_ = [
    "../_base_/mask2former.py",
    "../_base_/coco_panoptic.py",
    "../_base_/schedule_50e.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_small", pretrained=True, drop_path_rate=0.15),
    panoptic_head=dict(in_channels=[64, 128, 320, 512]),
)
