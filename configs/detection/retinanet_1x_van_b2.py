# RetinaNet, 1x, van_b2: no published result.
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco_boxes.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b2", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[128, 320, 512]),
)
