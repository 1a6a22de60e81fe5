"""What the tests of all operators share."""

import pytest
import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def close():
    """Assert that results are as near to exact ones as their dtype allows, by the norm of the difference."""

    def check(result, exact, scale=1.0):
        assert result.shape == exact.shape and result.isfinite().all()
        error = (result.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
        assert error <= scale * TOLERANCE[result.dtype], f"relative error {error:.2e} in {result.dtype}"

    return check


@pytest.fixture
def gradients():
    """Gradients of the inputs that require them, for a fixed random cotangent."""

    def compute(function, *inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        generator = torch.Generator().manual_seed(7)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        return y.detach(), torch.autograd.grad(y, leaves, cotangent)

    return compute
