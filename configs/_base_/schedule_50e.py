# 50 epochs of COCO; the rate falls to a tenth after 44 and after 48.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=50, val_interval=5)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[44, 48], gamma=0.1)]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2))
