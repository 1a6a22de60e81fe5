# A small Semantic FPN on van_nano: the category of every pixel of the scenes.
_base_ = "scenes.py"
custom_imports = dict(imports=["zoo.openmmlab", "zoo.tools.category_iou"])
default_scope = "mmseg"

channels = 96
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(384, 384),
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(type="ZooBackbone", model_name="van_nano", pretrained=True, drop_path_rate=0.05),
    neck=dict(type="FPN", in_channels=[32, 64, 128, 192], out_channels=channels, num_outs=4, norm_cfg=dict(type="BN")),
    decode_head=dict(
        type="FPNHead",
        in_channels=[channels] * 4,
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=64,
        dropout_ratio=0.1,
        num_classes=41,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        init_cfg=dict(type="Normal", std=0.05, override=dict(name="conv_seg")),
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True, loss_weight=1.0),
    ),
    test_cfg=dict(mode="whole"),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomResize", scale=(384, 384), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(384, 384), cat_max_ratio=0.98),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(448, 448), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root=_base_.scenes,
    metainfo=dict(classes=("background", *_base_.classes)),
    img_suffix=".jpg",
    seg_map_suffix=".png",
)
train_dataloader = dict(
    batch_size=32,
    num_workers=12,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **dataset, data_prefix=dict(img_path="images/train", seg_map_path="labels/train"), pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/test", seg_map_path="labels/test"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CategoryIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
