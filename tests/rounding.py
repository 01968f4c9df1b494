"""Products of matrices that are rounded otherwise each time they are computed.

Processors, libraries and threads add up in other orders. Here every product, forward and backward, is off by about what
that makes, at random: a test that holds under it asks for no bit that another machine need not give. It is in force
where TANZAKU_TEST_ROUNDING is set, to a seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "linear", "_linear_pointwise", "convolution"),
    "_scaled_dot_product_flash_attention_for_cpu",
}


class OtherRounding(TorchDispatchMode):
    """Within the block, products are off: in full precision by up to one rounding of the largest number of a row, in
    half precision, whose sums are in full, by one rounding of the number itself here and there."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] in PRODUCTS:
            product = out[0] if isinstance(out, tuple) else out
            if type(product) is Tensor and product.is_floating_point() and product.device.type == "cpu":
                self._round(product)
        return out

    def _round(self, product: Tensor) -> None:
        noise = torch.rand(product.shape, generator=self.generator).mul_(2).sub_(1)
        eps = torch.finfo(product.dtype).eps
        if product.element_size() < 4:
            product.mul_(1 + eps * (noise > 0.9) - eps * (noise < -0.9))
        elif product.dim():
            product.add_(noise * (eps * product.abs().amax(-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)))
