# Mask R-CNN, 3x, ravlt_base: published box / mask AP 52.7 / 46.4.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks_multiscale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_base", pretrained=True, drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
