"""Shape inventories: the names and shapes of a model's tensors, without the model.

An average of weights only deals with a model's tensors, so a list of names and shapes replaces the
network in tests and benchmarks. Only the standard library is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Inventory = list[tuple[str, tuple[int, ...]]]
"""Pairs of tensor name and shape, in the module's registration order."""


def gpt2(
    layers: int = 12, width: int = 768, vocab: int = 50_257, context: int = 1_024
) -> Inventory:
    """Return the parameters of GPT-2; the defaults are GPT-2 small.

    ``4 + 12 * layers`` tensors: 148 with 124,439,808 elements. The output projection is tied to
    ``wte`` and therefore not listed. Names match the published checkpoints; projections have shape
    ``(inputs, outputs)``.
    """
    inventory: Inventory = [
        ("transformer.wte.weight", (vocab, width)),
        ("transformer.wpe.weight", (context, width)),
    ]
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        inventory += [
            (f"{block}.ln_1.weight", (width,)),
            (f"{block}.ln_1.bias", (width,)),
            (f"{block}.attn.c_attn.weight", (width, 3 * width)),
            (f"{block}.attn.c_attn.bias", (3 * width,)),
            (f"{block}.attn.c_proj.weight", (width, width)),
            (f"{block}.attn.c_proj.bias", (width,)),
            (f"{block}.ln_2.weight", (width,)),
            (f"{block}.ln_2.bias", (width,)),
            (f"{block}.mlp.c_fc.weight", (width, 4 * width)),
            (f"{block}.mlp.c_fc.bias", (4 * width,)),
            (f"{block}.mlp.c_proj.weight", (4 * width, width)),
            (f"{block}.mlp.c_proj.bias", (width,)),
        ]
    inventory += [("transformer.ln_f.weight", (width,)), ("transformer.ln_f.bias", (width,))]
    return inventory


def _resnet50_convolutions() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (convolution, its batch norm, convolution's shape) in registration order."""
    yield "conv1", "bn1", (64, 3, 7, 7)
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            yield f"{block}.conv1", f"{block}.bn1", (width, channels, 1, 1)
            yield f"{block}.conv2", f"{block}.bn2", (width, width, 3, 3)
            yield f"{block}.conv3", f"{block}.bn3", (4 * width, width, 1, 1)
            if index == 0:
                yield f"{block}.downsample.0", f"{block}.downsample.1", (4 * width, channels, 1, 1)
            channels = 4 * width


def resnet50(classes: int = 1_000) -> Inventory:
    """Return the parameters of ResNet-50, including weights and biases of its batch norms.

    161 tensors with 25,557,032 elements for 1,000 classes. Two thirds of the tensors belong to
    batch norms and hold 0.2 % of the elements.
    """
    inventory: Inventory = []
    for convolution, norm, shape in _resnet50_convolutions():
        inventory += [
            (f"{convolution}.weight", shape),
            (f"{norm}.weight", shape[:1]),
            (f"{norm}.bias", shape[:1]),
        ]
    inventory += [("fc.weight", (classes, 2_048)), ("fc.bias", (classes,))]
    return inventory


def resnet50_buffers() -> Inventory:
    """Return the buffers of ResNet-50: running mean and variance, and a counter, per batch norm.

    159 tensors. Counters are 0-dim integers with names that end in ``num_batches_tracked``.
    """
    inventory: Inventory = []
    for _, norm, shape in _resnet50_convolutions():
        inventory += [
            (f"{norm}.running_mean", shape[:1]),
            (f"{norm}.running_var", shape[:1]),
            (f"{norm}.num_batches_tracked", ()),
        ]
    return inventory


def llama(
    layers: int = 32, width: int = 4_096, hidden: int = 11_008, vocab: int = 32_000
) -> Inventory:
    """Return the parameters of Llama; the defaults are the 7B model.

    ``3 + 9 * layers`` tensors: 291 with 6,738,415,616 elements. Linear layers have shape
    ``(outputs, inputs)``, as in the published checkpoints.
    """
    inventory: Inventory = [("model.embed_tokens.weight", (vocab, width))]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for projection in ("q", "k", "v", "o"):
            inventory.append((f"{block}.self_attn.{projection}_proj.weight", (width, width)))
        inventory += [
            (f"{block}.mlp.gate_proj.weight", (hidden, width)),
            (f"{block}.mlp.up_proj.weight", (hidden, width)),
            (f"{block}.mlp.down_proj.weight", (width, hidden)),
            (f"{block}.input_layernorm.weight", (width,)),
            (f"{block}.post_attention_layernorm.weight", (width,)),
        ]
    return [*inventory, ("model.norm.weight", (width,)), ("lm_head.weight", (vocab, width))]


def vit(layers: int = 12, width: int = 768, tokens: int = 197) -> Inventory:
    """Return the parameters of a vision transformer; the defaults are ViT-B/16 at 224 pixels.

    ``8 + 12 * layers`` tensors: 152 with 86,567,656 elements.
    """
    inventory: Inventory = [
        ("cls_token", (1, 1, width)),
        ("pos_embed", (1, tokens, width)),
        ("patch_embed.proj.weight", (width, 3, 16, 16)),
        ("patch_embed.proj.bias", (width,)),
    ]
    for layer in range(layers):
        block = f"blocks.{layer}"
        inventory += [
            (f"{block}.norm1.weight", (width,)),
            (f"{block}.norm1.bias", (width,)),
            (f"{block}.attn.qkv.weight", (3 * width, width)),
            (f"{block}.attn.qkv.bias", (3 * width,)),
            (f"{block}.attn.proj.weight", (width, width)),
            (f"{block}.attn.proj.bias", (width,)),
            (f"{block}.norm2.weight", (width,)),
            (f"{block}.norm2.bias", (width,)),
            (f"{block}.mlp.fc1.weight", (4 * width, width)),
            (f"{block}.mlp.fc1.bias", (4 * width,)),
            (f"{block}.mlp.fc2.weight", (width, 4 * width)),
            (f"{block}.mlp.fc2.bias", (width,)),
        ]
    inventory += [("norm.weight", (width,)), ("norm.bias", (width,))]
    return [*inventory, ("head.weight", (1_000, width)), ("head.bias", (1_000,))]


def vit_with_resnet50(layers: int = 12) -> Inventory:
    """Return the parameters of a vision transformer with a ResNet-50: two dtypes, many sizes."""
    return [*vit(layers), *((f"backbone.{name}", shape) for name, shape in resnet50())]


def vit_with_resnet50_buffers() -> Inventory:
    """Return the buffers of :func:`vit_with_resnet50`, which belong to its batch norms."""
    return [(f"backbone.{name}", shape) for name, shape in resnet50_buffers()]


def many_small(count: int = 1_000, low: int = 8, high: int = 64) -> Inventory:
    """Return `count` small matrices with sides between `low` and `high`, inclusive.

    The sides follow a fixed pattern instead of a random draw, so that shapes are the same for every
    Python version and platform. The defaults have 1.35 million elements.
    """
    span = high - low + 1
    return [
        (f"small.{i}", (low + (37 * i) % span, low + (i * i + 11 * i) % span)) for i in range(count)
    ]


def tiny(count: int = 64, elements: int = 1_024) -> Inventory:
    """Return `count` vectors of so few elements that a launch costs more than the work."""
    return [(f"tiny.{i}", (elements,)) for i in range(count)]


def equal(count: int = 400, elements: int = 50_000) -> Inventory:
    """Return `count` vectors of `elements` elements each."""
    return [(f"equal.{i}", (elements,)) for i in range(count)]


def flat(elements: int = 100_000_000) -> Inventory:
    """Return one flat buffer, whose update is only arithmetic and memory traffic."""
    return [("flat", (elements,))]


def scalars(count: int) -> Inventory:
    """Return `count` tensors of one element, whose update is only the overhead of calls."""
    return [(f"scalar.{i}", (1,)) for i in range(count)]


def total_elements(inventory: Inventory) -> int:
    """Return the total number of elements in `inventory`."""
    return sum(prod(shape) for _, shape in inventory)
