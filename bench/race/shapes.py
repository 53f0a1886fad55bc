"""Shape inventories: the names and shapes of a model's tensors, without the model.

An average of weights sees nothing of a model but its tensors, so a list of names and shapes
stands in for the network in tests and benchmarks. Only the standard library is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Inventory = list[tuple[str, tuple[int, ...]]]
"""Pairs of tensor name and shape, in the order in which the module registers them."""


def gpt2(
    layers: int = 12, width: int = 768, vocab: int = 50_257, context: int = 1_024
) -> Inventory:
    """Parameters of GPT-2; the defaults are GPT-2 small.

    ``4 + 12 * layers`` tensors: 148 with 124,439,808 elements. The output projection is tied to
    ``wte`` and so is not listed again. Names are those of the published checkpoints, projections
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
    """Yield (convolution, its batch norm, convolution's shape) in order of registration."""
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
    """Parameters of ResNet-50, the weights and biases of its batch norms among them.

    161 tensors, 25,557,032 elements with 1,000 classes; two thirds of the tensors belong to batch
    norms and hold 0.2 % of the elements.
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
    """Buffers of ResNet-50: running mean and variance, and a 0-dim integer counter, per batch norm.

    159 tensors; those whose names end in ``num_batches_tracked`` are integers.
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
    """Parameters of Llama; the defaults are the model of 7 billion.

    ``3 + 9 * layers`` tensors: 291 with 6,738,415,616 elements. Linear layers are
    ``(outputs, inputs)``, as the published checkpoints have them.
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
    """Parameters of a vision transformer; the defaults are ViT-B/16 at 224 pixels.

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
    """Parameters of a vision transformer beside a ResNet-50, in two dtypes and many sizes."""
    return [*vit(layers), *((f"backbone.{name}", shape) for name, shape in resnet50())]


def vit_with_resnet50_buffers() -> Inventory:
    """Buffers of :func:`vit_with_resnet50`: those of its batch norms."""
    return [(f"backbone.{name}", shape) for name, shape in resnet50_buffers()]


def many_small(count: int = 1_000, low: int = 8, high: int = 64) -> Inventory:
    """Many small matrices whose sides lie between `low` and `high`, both included.

    The sides follow a fixed pattern rather than a random draw, so that every Python version and
    platform gets the same shapes. With the defaults there are 1.35 million elements.
    """
    span = high - low + 1
    return [
        (f"small.{i}", (low + (37 * i) % span, low + (i * i + 11 * i) % span)) for i in range(count)
    ]


def equal(count: int = 400, elements: int = 50_000) -> Inventory:
    """`count` vectors of `elements` elements each."""
    return [(f"equal.{i}", (elements,)) for i in range(count)]


def flat(elements: int = 100_000_000) -> Inventory:
    """One flat buffer: no work but the arithmetic and the memory traffic."""
    return [("flat", (elements,))]


def scalars(count: int) -> Inventory:
    """`count` tensors of one element: an update costs nothing but the calls around it."""
    return [(f"scalar.{i}", (1,)) for i in range(count)]


def total_elements(inventory: Inventory) -> int:
    """Return the number of elements of all tensors in `inventory`."""
    return sum(prod(shape) for _, shape in inventory)
