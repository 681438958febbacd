"""Heads: features [batch, d] -> logits [batch, classes], the same in training and evaluation.

The weight of every head is one `kernel` [d, classes] whose column c is the vector w_c of class c. Heads compute in at
least float32 at full precision, even if the backbone computes in bfloat16 or an accelerator would round to TF32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lt_adv.models.layers import Array, at_least_float32, fan_in_uniform


class Linear(nn.Module):
    """z_c = w_c . f + b_c, with weight and bias initialised from U(+-1/sqrt(d)), PyTorch's default.

    Differs from the released RoBal code: its "bias-free" layer has a frozen random bias, this one has none.
    """

    num_classes: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        features = features.astype(at_least_float32(self.dtype))
        d, dtype = features.shape[-1], features.dtype
        kernel = self.param("kernel", fan_in_uniform, (d, self.num_classes), dtype)
        logits = jnp.dot(features, kernel, precision="highest")
        if not self.use_bias:
            return logits

        def bias_init(key: Array) -> Array:
            return jax.random.uniform(key, (self.num_classes,), dtype, -1 / math.sqrt(d), 1 / math.sqrt(d))

        return logits + self.param("bias", bias_init)


class LearnableScale(nn.Module):
    """z_c = s_c w_c . f without bias, s initialised to 1: learnable weight scaling (LWS, Kang et al. 2020).

    With the kernel of a trained linear head it starts as that head without its bias; freeze the kernel in training.
    """

    num_classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        features = features.astype(at_least_float32(self.dtype))
        shape = features.shape[-1], self.num_classes
        kernel = self.param("kernel", fan_in_uniform, shape, features.dtype)
        scale = self.param("scale", nn.initializers.ones, (self.num_classes,), features.dtype)
        return scale * jnp.dot(features, kernel, precision="highest")


class Cosine(nn.Module):
    """z_c = s (f / |f|^eta) . (w_c / (|w_c|^eta + gamma)) without bias, w ~ U(+-1/sqrt(d)).

    gamma = 0 and eta = 1 give s times the cosine of f and w_c. gamma > 0 is RoBal's head (Wu et al. 2021), in which
    classes with longer weights have slightly larger logits. RoBal trains at s = 1 (its loss applies the scale) and
    rescales afterwards, see `posthoc.boundary`. If f or w_c is exactly zero, so is the logit, and the gradient is
    finite; the released code divides by zero.
    """

    num_classes: int
    scale: float = 1.0
    gamma: float = 0.0
    eta: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        features = features.astype(at_least_float32(self.dtype))
        kernel = self.param("kernel", fan_in_uniform, (features.shape[-1], self.num_classes), features.dtype)
        directions = features / safe_norm(features, axis=-1) ** self.eta
        prototypes = kernel / (safe_norm(kernel, axis=0) ** self.eta + self.gamma)
        return self.scale * jnp.dot(directions, prototypes, precision="highest")


def safe_norm(x: Array, axis: int) -> Array:
    """Returns the Euclidean norm along `axis`, with that axis of size 1; the norm of a zero vector is 1."""
    # The 1 is set inside the square root, whose derivative at 0 is infinite.
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))
