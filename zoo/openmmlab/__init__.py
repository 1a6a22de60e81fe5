"""mmdet and mmseg with the backbones of this zoo and of timm; nothing compiled is needed.

Importing it makes ``mmcv.ops`` work without mmcv's compiled extension, mends what mmengine expects of older Pythons and
PyTorches, and registers the backbone, with a constructor of layer-wise learning rates. In a config::

    custom_imports = dict(imports=["zoo.openmmlab"])
    model = dict(backbone=dict(type="ZooBackbone", model_name="ravlt_small"))
"""

import importlib.util

if not all(map(importlib.util.find_spec, ("mmengine", "mmcv"))):
    raise ImportError("zoo.openmmlab needs mmengine and mmcv: pip install 'linear-vision-zoo[dense]'.")
try:
    import cv2  # noqa: F401  (mmengine and mmcv need it)
except ImportError as error:
    raise ImportError(
        f"OpenCV does not load ({error}): pip install --force-reinstall --no-deps opencv-python-headless, "
        f"or on Debian and Ubuntu apt-get install libgl1 libglib2.0-0."
    ) from error

from zoo.openmmlab import compat, ops

compat.apply()
OPS_FROM = ops.install()  # before anything else imports mmdet or mmseg

from zoo.openmmlab.backbone import ZooBackbone  # noqa: E402
from zoo.openmmlab.matching import CheckChannels, channels, check_channels  # noqa: E402
from zoo.openmmlab.optim import LayerDecayConstructor  # noqa: E402

__all__ = [
    "OPS_FROM",
    "CheckChannels",
    "LayerDecayConstructor",
    "ZooBackbone",
    "channels",
    "check_channels",
    "compat",
    "ops",
]
