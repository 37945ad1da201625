"""Efficient channel attention: other implementations, what a gate sees, and the published numbers of parameters."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import vision
from attnx.vision.efficient_channel_attention import RESNET_KERNELS

C = 12
X = np.random.default_rng(0).normal(size=(2, 4, 5, C)).astype(np.float32)
W = np.random.default_rng(1).normal(size=5).astype(np.float32)


def gates(x, apply):
    """What an image is multiplied by, [C]."""
    return np.asarray(apply(jnp.asarray(x)) / x)[0, 0, 0]


@pytest.mark.parametrize("padding", ["zero", "circular"])
def test_convolution(padding):
    """PyTorch's Conv1d over the means."""
    torch = pytest.importorskip("torch")
    conv = torch.nn.Conv1d(1, 1, 5, padding=2, padding_mode={"zero": "zeros"}.get(padding, padding), bias=False)
    conv.weight.data = torch.tensor(W)[None, None]
    expected = X * conv(torch.tensor(X.mean((1, 2)))[:, None])[:, 0].sigmoid().detach().numpy()[:, None, None]
    np.testing.assert_allclose(vision.eca(jnp.asarray(X), jnp.asarray(W), padding=padding), expected, atol=1e-6)


@pytest.mark.parametrize("padding", ["zero", "circular"])
def test_peer(padding):
    """The modules of timm, of which only their own files are imported: the whole needs more than is installed."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    package = types.ModuleType("timm_layers")
    package.__path__ = [f"{spec.submodule_search_locations[0]}/layers"]
    sys.modules["timm_layers"] = package
    try:
        peers = importlib.import_module("timm_layers.eca")
    except ImportError as error:
        pytest.skip(str(error))
    peer = (peers.EcaModule if padding == "zero" else peers.CecaModule)(kernel_size=5)
    peer.conv.weight.data = torch.tensor(W)[None, None]
    expected = peer(torch.tensor(X.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(vision.eca(jnp.asarray(X), jnp.asarray(W), padding=padding), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "channel", "padding", "seen"), [(1, 3, "zero", [3]), (5, 6, "zero", [4, 5, 6, 7, 8]), (5, 0, "zero", [0, 1, 2]),
                                                                  (5, 0, "circular", [0, 1, 2, 10, 11])])
def test_reach(size, channel, padding, seen):
    """A channel changes the gates of its neighbours, which end at the first and last channel or wrap around."""
    apply = lambda x: vision.eca(x, jnp.ones(size), padding=padding)
    changed = X.copy()
    changed[..., channel] += 1
    assert np.flatnonzero(~np.isclose(gates(X, apply), gates(changed, apply), atol=1e-6)).tolist() == seen


def test_symmetries():
    """Gates do not mind where things are; they do mind the order of channels, but for SE-Var3, whose weights can be permuted alike."""
    apply = lambda x: vision.eca(x, jnp.asarray(W))
    shuffled = np.random.default_rng(2).permutation(X.reshape(2, 20, C), axis=1).reshape(X.shape)
    np.testing.assert_allclose(gates(shuffled, apply), gates(X, apply), atol=1e-6)
    order = np.random.default_rng(3).permutation(C)
    assert np.abs(gates(X[..., order], apply) - gates(X, apply)[order]).max() > 1e-2
    dense = jnp.asarray(np.random.default_rng(4).normal(size=(C, C)).astype(np.float32))
    np.testing.assert_allclose(gates(X[..., order], lambda x: vision.se_var3(x, dense[order][:, order])), gates(X, lambda x: vision.se_var3(x, dense))[order],
                               atol=1e-6)


def test_ladder():
    """Each variant is a special case of the next."""
    x, w = jnp.asarray(X), jnp.asarray(np.random.default_rng(5).normal(size=C).astype(np.float32))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    close(vision.eca_ns(x, jnp.tile(W, (C, 1))), vision.eca(x, jnp.asarray(W)))
    close(vision.eca(x, jnp.ones(1)), vision.se_var1(x))
    close(vision.eca_ns(x, w[:, None]), vision.se_var2(x, w))
    close(vision.se_var2(x, w), vision.se_var3(x, jnp.diag(w)))
    positive = jnp.abs(x)
    close(vision.se(positive, jnp.eye(C), jnp.diag(w)), vision.se_var2(positive, w))


def test_parameters():
    """80 in ECA-Net50, and the sizes that the formula gives."""
    layers = [vision.ECA(channels, size, rngs=nnx.Rngs(0)) for channels, size, blocks in zip((256, 512, 1024, 2048), RESNET_KERNELS[50], (3, 4, 6, 3))
              for _ in range(blocks)]
    assert sum(x.size for layer in layers for x in jax.tree.leaves(nnx.state(layer, nnx.Param))) == 80
    assert [vision.eca_kernel_size(c) for c in (16, 32, 64, 256, 512)] == [3, 3, 3, 5, 5]
    assert vision.ECA(64, shared=False, rngs=nnx.Rngs(0)).kernel.shape == (64, 3)


def test_refusals():
    """Even kernels and shapes that do not fit."""
    x = jnp.asarray(X)
    with pytest.raises(ValueError, match="w: expected an odd number"):
        vision.eca(x, jnp.ones(4))
    with pytest.raises(ValueError, match="kernel_size: expected an odd"):
        vision.ECA(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"w: expected shape \[C, k\]"):
        vision.eca_ns(x, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="w1: expected shapes"):
        vision.se(x, jnp.ones((C, 2)), jnp.ones((3, C)))
