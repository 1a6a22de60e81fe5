# 36 epochs of COCO; the rate falls to a tenth after 27 and after 33.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=36, val_interval=3)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, milestones=[27, 33], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2))
