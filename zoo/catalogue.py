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
        reconstruction: written from the paper's description, without code of the authors: details may differ.
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
    reconstruction: bool = False


_VAN = ("VAN", "Visual Attention Network, arXiv:2202.09741", "Apache-2.0")
_RAVLT = ("RAVLT", "Breaking the Low-Rank Dilemma of Linear Attention, arXiv:2411.07635", "MIT")
_LIGHTNET = ("LightNet", "You Only Scan Once, arXiv:2405.21022", "Apache-2.0")
_VIG = ("ViG", "Linear-complexity Visual Sequence Learning with Gated Linear Attention, arXiv:2405.18425", "MIT")
_INLINE = ("InLine", "Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv:2412.06590", "not stated")
_SLAB = ("SLAB", "SLAB: Simplified Linear Attention and PRepBN, arXiv:2405.11582", "not stated")
_VAN_HUB = "hf-hub:Visual-Attention-Network/VAN-{}-original/van_{}.pth.tar"
_VIG_HUB = "hf-hub:hustvl/ViG"  # the names of its files are not published
_RAVLT_HUB = "hf-hub:aldjalkdf/RAVLT/RAVLT_{}.pth"
_INLINE_URL = "https://cloud.tsinghua.edu.cn/f/{}/?dl=1"
_SLAB_URL = "https://github.com/xinghaochen/SLAB/releases/download/ckpts/{}.pth"

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
    Entry("vig_nano", *_VIG, 2_863_156, 555_622_528, None, "", False),
    Entry("vig_tiny", *_VIG, 5_834_536, 1_167_762_432, 77.2, _VIG_HUB, True),
    Entry("vig_small", *_VIG, 22_615_144, 4_481_452_032, 81.7, _VIG_HUB, True),
    Entry("vig_base", *_VIG, 89_022_184, 17_546_612_736, 82.6, _VIG_HUB, True),
    Entry("vig_h_tiny", *_VIG, 28_600_680, 4_494_480_384, 82.8, _VIG_HUB, True),
    Entry("vig_h_small", *_VIG, 50_051_688, 8_751_111_168, 83.8, _VIG_HUB, False),
    Entry("vig_h_base", *_VIG, 88_904_360, 15_556_988_928, 84.2, _VIG_HUB, True),
    Entry("lightnet_nano", *_LIGHTNET, 2_306_620, 1_739_872_768, None, "", False, reconstruction=True),
    Entry("lightnet_tiny", *_LIGHTNET, 6_001_390, 1_195_835_904, None, "", False, reconstruction=True),
    Entry("lightnet_small", *_LIGHTNET, 22_618_612, 4_472_570_880, None, "", False, reconstruction=True),
    Entry("lightnet_base", *_LIGHTNET, 87_703_552, 17_268_738_048, None, "", False, reconstruction=True),
    Entry("inline_nano", *_INLINE, 3_581_428, 508_426_240, None, "", False),
    Entry(
        "inline_deit_tiny", *_INLINE, 6_477_736, 1_109_155_584, 74.5, _INLINE_URL.format("1d6b8191ad6d4114b291"), True
    ),
    Entry(
        "inline_deit_small", *_INLINE, 16_734_760, 3_010_545_920, 80.2, _INLINE_URL.format("2f3898b07e9247f3beb3"), True
    ),
    Entry(
        "inline_deit_base", *_INLINE, 23_797_096, 4_309_827_072, 82.3, _INLINE_URL.format("10bdd726d4b0435eb34e"), True
    ),
    Entry(
        "inline_pvt_tiny", *_INLINE, 12_032_232, 1_975_843_840, 78.2, _INLINE_URL.format("90ac52b1555b401eb5e6"), True
    ),
    Entry(
        "inline_pvt_small", *_INLINE, 21_556_136, 3_914_868_736, 82.0, _INLINE_URL.format("1ab953b2479d433080a3"), True
    ),
    Entry(
        "inline_pvt_medium",
        *_INLINE,
        37_618_856,
        6_861_930_496,
        83.2,
        _INLINE_URL.format("a72aec31e6084bc0a280"),
        False,
    ),
    Entry(
        "inline_pvt_large", *_INLINE, 51_154_280, 10_129_699_328, 83.6, _INLINE_URL.format("efd91318ba964f01b288"), True
    ),
    Entry(
        "inline_swin_tiny", *_INLINE, 29_223_544, 4_458_974_208, 82.4, _INLINE_URL.format("32810869fcc34410966b"), True
    ),
    Entry(
        "inline_swin_small", *_INLINE, 49_793_296, 8_719_383_552, 83.6, _INLINE_URL.format("e9657fd247c04c7cb1a1"), True
    ),
    Entry(
        "inline_swin_base", *_INLINE, 88_350_120, 15_397_801_984, 84.1, _INLINE_URL.format("bf23564bb64c420aafe1"), True
    ),
    Entry("inline_swin_base_384", *_INLINE, 88_465_320, 16_674_504_704, None, "", True),
    Entry(
        "inline_cswin_tiny", *_INLINE, 20_604_520, 4_311_612_928, 83.2, _INLINE_URL.format("49fa2ecc543647c4b970"), True
    ),
    Entry(
        "inline_cswin_small",
        *_INLINE,
        33_032_872,
        6_772_973_568,
        83.8,
        _INLINE_URL.format("59f4e65f776f4052b93c"),
        False,
    ),
    Entry(
        "inline_cswin_base",
        *_INLINE,
        73_413_640,
        14_884_720_128,
        84.5,
        _INLINE_URL.format("91e17121df284ae38521"),
        True,
    ),
    Entry("inline_cswin_base_384", *_INLINE, 73_413_640, 15_728_160_768, 85.7, "", True),
    Entry("slab_nano", *_SLAB, 3_491_585, 521_519_104, None, "", False),
    Entry("slab_deit_tiny", *_SLAB, 6_198_209, 1_139_086_848, 74.3, _SLAB_URL.format("slab_deit_tiny"), True),
    Entry("slab_deit_small", *_SLAB, 22_992_257, 4_359_072_768, 80.0, _SLAB_URL.format("slab_deit_small"), True),
    Entry("slab_pvt_tiny", *_SLAB, 12_157_692, 2_037_406_720, 76.5, _SLAB_URL.format("slab_pvt_tiny"), True),
    Entry("slab_pvt_small", *_SLAB, 21_683_788, 4_029_945_856, None, "", False),
    Entry("slab_pvt_medium", *_SLAB, 37_267_300, 7_035_990_016, None, "", True),
    Entry("slab_swin_tiny", *_SLAB, 29_216_605, 4_483_341_312, 81.8, _SLAB_URL.format("slab_swin_tiny"), True),
    Entry("slab_swin_small", *_SLAB, 50_552_965, 8_733_649_920, 83.6, _SLAB_URL.format("slab_swin_small"), False),
    Entry("slab_swin_base", *_SLAB, 89_029_373, 15_421_313_024, None, "", True),
    Entry("slab_cswin_tiny", *_SLAB, 21_227_167, 4_324_253_184, 82.8, _SLAB_URL.format("slab_cswin_tiny"), True),
    Entry("slab_cswin_small", *_SLAB, 35_493_565, 6_783_052_800, None, "", True),
    Entry("prepbn_deit_tiny", *_SLAB, 5_717_441, 1_253_683_200, 73.6, _SLAB_URL.format("deit_tiny_prepbn"), True),
    Entry("prepbn_deit_small", *_SLAB, 22_069_889, 4_598_882_304, 80.2, _SLAB_URL.format("deit_small_prepbn"), False),
    Entry("prepbn_pvt_tiny", *_SLAB, 13_239_554, 1_926_417_408, 76.0, _SLAB_URL.format("pvt_tiny_prepbn"), True),
    Entry("prepbn_pvt_small", *_SLAB, 24_507_801, 3_805_960_192, 80.1, _SLAB_URL.format("pvt_small_prepbn"), True),
    Entry("prepbn_pvt_medium", *_SLAB, 44_253_117, 6_649_434_112, 81.7, _SLAB_URL.format("pvt_medium_prepbn"), True),
    Entry("prepbn_swin_tiny", *_SLAB, 28_288_383, 4_490_566_656, 81.4, _SLAB_URL.format("swin_tiny_prepbn"), True),
)

CATALOGUE = {entry.name: entry for entry in _ENTRIES}
DEFAULT_MODEL = "van_nano"
