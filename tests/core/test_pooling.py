"""Pooling to a given size, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx.core.pooling import adaptive_average_pool


@pytest.mark.parametrize(("space", "sizes"), [((14, 14), (7, 7)), ((15, 13), (4, 4)), ((3, 5), (5, 2))])
def test_torch(space, sizes):
    torch = pytest.importorskip("torch")
    x = jax.random.normal(jax.random.key(0), (2, *space, 3))
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), sizes)
    np.testing.assert_allclose(adaptive_average_pool(x, sizes), expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="x: expected shape"):
        adaptive_average_pool(jnp.ones((2, 3)), (2, 2))
    with pytest.raises(ValueError, match="bins: expected"):
        adaptive_average_pool(jnp.ones((2, 3)), (0,))
