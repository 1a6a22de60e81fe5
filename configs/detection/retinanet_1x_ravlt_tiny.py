# RetinaNet, 1x, ravlt_tiny: published box AP 45.9.
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco_boxes.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_tiny", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[128, 256, 512]),
)
