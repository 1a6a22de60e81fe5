"""Convolution at some pixels only, as ``mmcv.ops.masked_conv`` calls it: gather patches, multiply, scatter."""

from torch import Tensor
from torch.nn.functional import unfold

__all__ = ["masked_col2im_forward", "masked_im2col_forward"]


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Patches around the M pixels of a mask.

    Args:
        im: one picture, (1, C, H, W).
        mask_h_idx: rows, (M,) int64.
        mask_w_idx: columns, (M,) int64.
        col: receives the patches, (C * kernel_h * kernel_w, M).
        kernel_h: height of a patch.
        kernel_w: its width.
        pad_h: zeros above and below the picture.
        pad_w: zeros left and right of it.
    """
    width = im.shape[3] + 2 * pad_w - kernel_w + 1
    patches = unfold(im, (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    col.copy_(patches[:, mask_h_idx * width + mask_w_idx])


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write the columns of ``col`` (C, M) to the M pixels of ``im`` (1, C, H, W)."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
