"""GPU kernels in a wheel: complete, chosen by GPU, and never loaded for other sources."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import fastema
from fastema.engine import build_kernels, shipped
from fastema.engine.cubins import Key, cubin
from fastema.errors import ArgumentError
from fastema.kernels.stamp import source_stamp
from fastema.kernels.variants import gpu_variants

from ..support.stub_gpu import KEYS, StubGpu, gpu

__all__ = ["gpu"]

LERP = ("lerp", ("f32", "bf16"), "flat")
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "ptx")


FLOATS = ("float64", "float32", "float16", "bfloat16")
USES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"decay": (0.9, 0.99)},
    "guard": {"on_nonfinite": "skip"},
    "capturable": {"capturable": True},
}


def build_module(dtype: str) -> torch.nn.Module:
    """Build a module with a dense and a strided parameter, and float, integer and bool buffers."""
    module = torch.nn.Module()
    values = torch.randn(60).to(getattr(torch, dtype))
    module.flat = torch.nn.Parameter(values[:20].clone())
    module.spaced = torch.nn.Parameter(values[20:].reshape(8, 5)[:, ::2])
    module.register_buffer("mean", values[:5].clone())
    module.register_buffer("count", torch.tensor(3))
    module.register_buffer("flags", torch.tensor([True, False]))
    module.register_buffer("bytes", torch.arange(5, dtype=torch.int8))
    return module


def use_average(average: Any, weights: torch.nn.Module) -> None:
    """Call every method that launches kernels."""
    average.update()
    for index in range(len(getattr(average, "averages", ())) or 1):
        with average.swapped(which=index):
            pass
        average.copy_to(weights, which=index)
    average.load_state_dict(average.state_dict())
    average.update()


@pytest.fixture
def record_keys(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the requested kernels; launches do nothing."""
    monkeypatch.setattr(gpu.driver, "launch", lambda *args: None)
    KEYS.clear()


def check_shipped(least: int) -> None:
    asked = {key[:3] for key in KEYS.values()}
    assert not asked - set(gpu_variants())
    assert len(asked) >= least


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("record_keys")
def test_every_kernel_that_an_average_selects_is_shipped(dtype: str) -> None:
    for stored, rounding, options in product(
        (None, *FLOATS, "bf16+16"), ("stochastic", "nearest"), USES.values()
    ):
        weights = build_module(dtype)
        try:
            average = fastema.EMA(weights, shadow_dtype=stored, rounding=rounding, **options)
        except ArgumentError:  # this dtype has no such rounding
            continue
        use_average(average, weights)
    for kind in (fastema.SWA, fastema.PowerEMA):
        weights = build_module(dtype)
        use_average(kind(weights), weights)
    check_shipped(20)


@pytest.mark.usefixtures("record_keys")
def test_every_kernel_that_a_plan_selects_is_shipped() -> None:
    for dst, src in product(FLOATS, FLOATS):
        one, other = (torch.randn(30).to(getattr(torch, name)) for name in (dst, src))
        for first, second in ((one, other), (one[::2], other[::2])):
            plan = fastema.Plan([first], [second], rounding="stochastic")
            plan.lerp_(0.5)
            plan.copy_()
            plan.swap_()
    check_shipped(60)


def code_for(target: str, operation: str = "lerp") -> bytes:
    return f"{target} {operation}".encode()


def read(
    operation: str, formats: tuple[str, ...], layout: str, capability: tuple[int, int]
) -> bytes | None:
    return shipped.read("gpu", operation, formats, layout, shipped.gpu_targets(capability))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a folder with one kernel for every GPU target."""
    for target in TARGETS:
        others = {(("f32", "f32"), "flat"): b"another", (LERP[1], "strided"): b"gaps"}
        shipped.write(tmp_path / "gpu" / target / "lerp.xz", {**others, LERP[1:]: code_for(target)})
    (tmp_path / "gpu" / "stamp").write_text(source_stamp())
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        *(((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80")),
        *(((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "ptx")),
        *(((12, 0), "sm_120"), ((12, 1), "sm_120"), ((13, 0), "ptx")),
    ],
)
@pytest.mark.usefixtures("wheel")
def test_a_gpu_gets_the_code_it_can_run(capability: tuple[int, int], target: str) -> None:
    made = cubin(Key(*LERP, capability))
    assert made == ("fastema_lerp", code_for(target))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mul.f32 %f1, %f2, %f3;", "could be fused"),
        ("add.f64 %d1, %d2, %d3;", "could be fused"),
        ("mul.rn.f32 %f1, %f2, %f3; fma.rn.f32 %f1, %f1, %f2, %f3;", ""),
    ],
)
def test_ptx_with_fusible_arithmetic_is_refused(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.kernels import cuda

    ptx = cuda.Ptx("fastema_lerp", f".version 8.8\n{text}")
    made = cuda.Binary(ptx.name, ptx.text, b"code", 32, 0, 0)
    monkeypatch.setattr(cuda, "translate", lambda *args: ptx)
    monkeypatch.setattr(cuda, "assemble", lambda *args: made)
    if words:
        with pytest.raises(RuntimeError, match=words):
            build_kernels._compile_for_gpus(gpu_variants()[0])
    else:
        codes = build_kernels._compile_for_gpus(gpu_variants()[0])
        assert codes == {**dict.fromkeys(TARGETS[:-1], b"code"), "ptx": ptx.text.encode()}


def test_kernels_of_other_sources_are_not_loaded(wheel: Path) -> None:
    assert shipped.targets("gpu") == sorted(TARGETS)
    assert shipped.targets("cpu") == []
    stamp = wheel / "gpu" / "stamp"
    stamp.write_text("0" * 16)
    assert read(*LERP, (9, 0)) is None
    assert shipped.targets("gpu") == []
    stamp.unlink()
    assert read(*LERP, (9, 0)) is None


@pytest.mark.usefixtures("wheel")
def test_the_kernels_of_an_operation_are_decompressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import lzma

    unpacked, decompress = [], lzma.decompress

    def counted(packed: bytes) -> bytes:
        unpacked.append(packed)
        return decompress(packed)

    monkeypatch.setattr(lzma, "decompress", counted)
    for formats, layout, code in (
        (LERP[1], LERP[2], code_for("sm_90")),
        (LERP[1], "strided", b"gaps"),
        (("f32", "f32"), "flat", b"another"),
        (("f64", "f64"), "flat", None),
    ):
        assert read("lerp", formats, layout, (9, 0)) == code
    assert len(unpacked) == 1


def test_replaced_kernels_are_read_again(wheel: Path) -> None:
    path = wheel / "gpu" / "sm_90" / "lerp.xz"
    assert read(*LERP, (9, 0)) == code_for("sm_90")
    shipped.write(path, {LERP[1:]: b"new code"})
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert read(*LERP, (9, 0)) == b"new code"


@pytest.mark.parametrize("wrong", [{"spilled": 8}, {"stack": 16}, {"name": "other"}], ids=str)
def test_kernels_that_spill_or_are_misnamed_are_refused(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.kernels import cuda

    ptx = cuda.Ptx(wrong.get("name", "fastema_lerp"), ".version 8.8\n")
    made = cuda.Binary(ptx.name, ptx.text, b"code", 32, 0, 0)._replace(**wrong)
    monkeypatch.setattr(cuda, "translate", lambda *args: ptx)
    monkeypatch.setattr(cuda, "assemble", lambda *args: made)
    with pytest.raises(RuntimeError, match=r"lerp.*(spills|other)"):
        build_kernels._compile_for_gpus(gpu_variants()[0])
