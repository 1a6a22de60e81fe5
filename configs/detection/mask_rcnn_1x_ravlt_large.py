# Mask R-CNN, 1x, ravlt_large: published box / mask AP 52.3 / 46.4.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_large", pretrained=True, drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
