# What the quickstart models share: the categories of the scenes, the schedule and the optimizer.
custom_imports = dict(imports=["zoo.openmmlab"])

scenes = "data/scenes/"  # python -m zoo.tools.build_quickstart_data scenes data/scenes
classes = (
    "airplane",
    "anchor",
    "balloon",
    "banana",
    "bicycle",
    "birthday cake",
    "bus",
    "butterfly",
    "cactus",
    "camera",
    "carrot",
    "crab",
    "crown",
    "dog face",
    "elephant",
    "fish",
    "grapes",
    "guitar",
    "hamburger",
    "hammer",
    "honeybee",
    "light bulb",
    "locomotive",
    "mushroom",
    "octopus",
    "owl",
    "palm tree",
    "penguin",
    "pineapple",
    "pizza",
    "rocket",
    "sailboat",
    "scissors",
    "snail",
    "soccer ball",
    "strawberry",
    "sunflower",
    "teapot",
    "turtle",
    "umbrella",
)

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=16, val_interval=8)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=8e-4, weight_decay=0.05, fused=True),
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.9, norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=200),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=0.02, interval=5, update_buffers=True, priority=49)]
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2), logger=dict(type="LoggerHook", interval=50)
)
randomness = dict(seed=0)
export_half = True  # write float16 weights
