# Cascade Mask R-CNN, 3x, ravlt_small: published box / mask AP 54.2 / 46.8.
_base_ = [
    "../_base_/cascade_mask_rcnn.py",
    "../_base_/coco_masks_multiscale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_small", pretrained=True, drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
