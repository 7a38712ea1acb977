"""Products with the same matrix again and again, as cached sampling has them."""

import pytest
import torch

from condgen.nn import incremental
from condgen.nn.incremental import PACKED, Product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("packed", [True, False])
def test_a_product_is_added_to_its_base_and_changes_nothing_else(rows, dtype, packed, monkeypatch):
    monkeypatch.setattr(incremental, "PACKED", packed and PACKED)
    monkeypatch.setattr(incremental, "LARGE", 4 * 40 * 24)
    made = torch.Generator().manual_seed(rows)
    matrix = torch.randn(40, 24, generator=made).to(dtype)
    wide = torch.randn(rows, 50, generator=made).to(dtype)
    x = wide[:, 3:43]  # a window of a row: not in one piece
    product = Product(matrix, rows)
    assert (product.packed is not None) == (packed and PACKED and rows >= 4 and dtype == torch.float32)
    for base in (torch.randn(24, generator=made).to(dtype).expand(rows, -1), torch.randn(rows, 24, generator=made)):
        base = base.to(dtype)
        kept = base.clone(), x.clone()
        expected = base + x @ matrix
        exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(product(base, x), expected, **exact)
        out = torch.full((rows, 2, 24), 7.0, dtype=dtype)
        product(base, x, out[:, 1])
        torch.testing.assert_close(out[:, 1], expected, **exact)
        assert (out[:, 0] == 7).all() and torch.equal(base, kept[0]) and torch.equal(x, kept[1])
