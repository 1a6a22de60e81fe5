"""Models made ready for inference."""

import copy
import warnings
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, with norms and scales folded into the layers next to them.

    Batch norms and layer scales of the zoo's models disappear, and so does whatever else has a ``fuse`` method, as in
    ``timm.utils.reparameterize_model``. The outputs are the same up to rounding. The copy cannot be trained.

    Args:
        model: a zoo or timm model; left as it is.

    Returns:
        The copy, in evaluation mode.
    """
    return reparameterize_model(copy.deepcopy(model).eval(), inplace=True)


def optimize(model: nn.Module, sample: Tensor, *, compile: bool = True) -> nn.Module:
    """A copy of a model for inference at full speed on pictures like a sample, with the same outputs up to rounding.

    It is fused (see ``fuse``), has its convolutions in ``torch.channels_last``, and goes through ``torch.compile`` here
    and now, which takes a minute or so. On an NVIDIA GPU the work for pictures of the sample's shape becomes one CUDA
    graph. Pictures of any other shape that the model takes go through the compiled model; the first of them compiles
    it once more, for all shapes. Where no compiler works (on a CPU it is a C++ compiler) there is one warning, and the
    rest is done all the same.

    Args:
        model: a zoo or timm model; left as it is.
        sample: pictures (B, C, H, W) such as those to come. The copy is fused in the model's dtype, then moved to the
            sample's device and cast to its dtype (bfloat16 for speed on a GPU), and takes no other. It computes in that
            dtype under autocast, too.
        compile: whether to compile; if not, the first outputs are there at once.

    Returns:
        The copy: a module that gives what the model gives, without gradients.

    Raises:
        ValueError: the sample is not floating-point (B, C, H, W), or a picture has not its device and dtype.
    """
    if sample.ndim != 4 or not sample.is_floating_point():
        raise ValueError(
            f"The sample is {sample.dtype} of shape {tuple(sample.shape)}, expected floating-point (B, C, H, W)."
        )
    fused = fuse(model).to(sample.device, sample.dtype, memory_format=torch.channels_last)
    return _Optimized(fused, sample, compile)


class _Optimized(nn.Module):
    def __init__(self, model: nn.Module, sample: Tensor, compile: bool) -> None:
        super().__init__()
        self.device, self.dtype = sample.device, sample.dtype
        self.model, self.graph = model, None
        self.eval()
        self(sample)  # what is wrong with the model or the sample is said in their words, not in the compiler's
        if compile:
            from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import

            self.model = torch.compile(model)
            try:
                self(sample)
            except BackendCompilerFailed as error:
                reason = str(error).partition("\n")[0].rstrip(".")
                warnings.warn(f"The model runs without torch.compile, which failed: {reason}.", stacklevel=3)
                self.model = model
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._capture(sample)

    @torch.inference_mode(False)  # what is made here is written to in any mode
    @torch.no_grad()
    def _capture(self, sample: Tensor) -> None:
        """Record what the GPU does for pictures of the sample's shape."""
        self.pictures = sample.clone(memory_format=torch.channels_last)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is set up on first use must not be recorded
            for _ in range(3):
                self._compute(self.pictures)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self._compute(self.pictures)
        self.graph = graph

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Any:
        if (pictures.device, pictures.dtype) != (self.device, self.dtype):
            raise ValueError(
                f"The pictures are {pictures.dtype} on {pictures.device}, but the model was optimised for {self.dtype} "
                f"on {self.device}: convert them with .to(), or optimise it with such a sample."
            )
        if self.graph is None or pictures.shape != self.pictures.shape:
            return self._compute(pictures.contiguous(memory_format=torch.channels_last))
        self.pictures.copy_(pictures)
        self.graph.replay()
        return _cloned(self.outputs)

    def _compute(self, pictures: Tensor) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return self.model(pictures)


def _cloned(outputs: Any) -> Any:
    """A tensor, or a list or tuple of such, that the next replay of the graph does not overwrite."""
    return outputs.clone() if isinstance(outputs, Tensor) else type(outputs)(_cloned(output) for output in outputs)
