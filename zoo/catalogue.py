"""What is known of every model of the zoo: `zoo list`, `zoo info` and the table of the README.

The numbers stand here so that listing builds no model; the tests count them again.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: for ``timm.create_model``.
        family: of the paper.
        paper: title and where it is.
        licence: of the weights.
        params: number of parameters.
        macs: multiply-accumulates for one picture of 224 x 224: convolutions, matrix products, attention.
        top1: accuracy on ImageNet-1k in percent as published; None where nothing is.
        weights: where they are; empty where there are none.
        golden: our logits were compared with the authors' own, on weights made for the purpose.
    """

    name: str
    family: str
    paper: str
    licence: str
    params: int
    macs: int
    top1: float | None
    weights: str
    golden: bool


_VAN = ("VAN", "Visual Attention Network, arXiv:2202.09741", "Apache-2.0")
_RAVLT = ("RAVLT", "Breaking the Low-Rank Dilemma of Linear Attention, arXiv:2411.07635", "MIT")
_VAN_HUB = "hf-hub:Visual-Attention-Network/VAN-{}-original/van_{}.pth.tar"
_RAVLT_HUB = "hf-hub:aldjalkdf/RAVLT/RAVLT_{}.pth"

_ENTRIES = (
    Entry("van_nano", *_VAN, 2_847_284, 613_067_776, None, "packaged", False),
    Entry("van_b0", *_VAN, 4_105_800, 864_224_000, 75.4, _VAN_HUB.format("Tiny", "tiny_754"), True),
    Entry("van_b1", *_VAN, 13_861_800, 2_495_262_720, 81.1, _VAN_HUB.format("Small", "small_811"), True),
    Entry("van_b2", *_VAN, 26_578_472, 4_992_773_120, 82.8, _VAN_HUB.format("Base", "base_828"), True),
    Entry("van_b3", *_VAN, 44_765_608, 8_925_292_032, 83.9, _VAN_HUB.format("Large", "large_839"), True),
    Entry("van_b4", *_VAN, 60_283_176, 12_143_756_288, None, "", True),
    Entry("van_b5", *_VAN, 89_967_688, 17_129_123_328, None, "", False),
    Entry("van_b6", *_VAN, 199_829_416, 38_710_096_896, None, "", True),
    Entry("ravlt_nano", *_RAVLT, 2_910_196, 611_071_296, None, "", False),
    Entry("ravlt_tiny", *_RAVLT, 14_897_768, 2_613_312_000, None, _RAVLT_HUB.format("T"), True),
    Entry("ravlt_small", *_RAVLT, 25_591_208, 4_878_388_352, 84.4, _RAVLT_HUB.format("S"), True),
    Entry("ravlt_base", *_RAVLT, 48_241_288, 10_579_554_816, None, _RAVLT_HUB.format("B"), False),
    Entry("ravlt_large", *_RAVLT, 95_242_440, 17_208_927_104, None, _RAVLT_HUB.format("L"), True),
)

CATALOGUE = {entry.name: entry for entry in _ENTRIES}
DEFAULT_MODEL = "van_nano"
