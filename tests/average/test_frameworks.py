"""Averages of arrays of every framework: NumPy, JAX, TensorFlow."""

from collections.abc import Iterator

import numpy as np
import pytest

import fastema
from fastema.errors import NonFiniteError, StateError

from ..support.states import nested
from .frameworks import FLOATS, FRAMEWORKS, Framework, open_framework, values
from .truth import Loops, arithmetic_of

NEEDS = ("ml_dtypes",)

DECAY = 0.9


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Iterator[Framework]:
    with open_framework(request.param) as found:
        yield found


@pytest.mark.parametrize("weights", FLOATS)
def test_every_dtype_pair_equals_a_float64_loop(framework: Framework, weights: str) -> None:
    for stored in FLOATS:  # every pair of dtypes
        held = framework.make_all(values(0, FLOATS[weights]))
        ema = fastema.EMA(held, DECAY, shadow_dtype=FLOATS[stored])
        random, arithmetic = stored in ("f16", "bf16"), arithmetic_of(weights, stored)
        loops = Loops(framework.wide(held), stored, arithmetic, random)
        for n in range(1, 41):
            given = framework.train(held, values(n, FLOATS[weights]))
            before = framework.bits(held)
            ema.update(*given)
            assert framework.bits(held) == before
            loops.step(framework.wide(held), 1 - DECAY)
        assert set(ema.shadow) == set(held)
        for one in ema.shadow.values():
            assert isinstance(one, framework.kind)
            assert one.dtype == FLOATS[stored]
        loops.check(framework.wide(ema.shadow))


@pytest.mark.parametrize("framework", [FRAMEWORKS[0], FRAMEWORKS[2]], indirect=True)
@pytest.mark.parametrize("stored", [*FLOATS.values(), "bf16+16"])
def test_swap_between_dtypes_restores_both_sides(framework: Framework, stored: str) -> None:
    for weights in FLOATS.values():
        held = framework.make_all(values(0, weights))
        ema = fastema.EMA(held, 0.5, shadow_dtype=stored)
        for n in range(1, 4):
            ema.update(*framework.train(held, values(n, weights)))
        raw, average = framework.bits(held), framework.bits(ema.shadow)
        for _ in range(3):
            with ema.swapped() as swapped:
                assert swapped is held
                assert framework.bits(ema.shadow) == average
                assert framework.bits(nested(ema.state_dict())["shadow"][0]) == average
                for name, one in held.items():
                    shadow, got = framework.read(ema.shadow[name]), framework.read(one)
                    if "bf" in weights + stored:
                        near = [x.astype(np.float64) for x in (got, shadow)]
                        np.testing.assert_allclose(*near, rtol=2**-7, atol=1e-6)
                    else:
                        assert got.tobytes() == shadow.astype(got.dtype).tobytes()
                with pytest.raises(StateError):
                    ema.update()
            assert framework.bits(held) == raw
            assert framework.bits(ema.shadow) == average


def test_nonfinite_weights_are_skipped_or_raise(framework: Framework) -> None:
    good = {"w": np.full(90, 3.0, np.float32), "v": np.full(3, 3.0, np.float32)}
    held = framework.make_all(good)
    skipping = fastema.EMA(held, 0.5, on_nonfinite="skip")
    raising = fastema.EMA(held, 0.5, on_nonfinite="raise")
    for place, bad in {70: np.nan, 0: np.inf, 89: -np.inf}.items():
        spoilt = good["w"].copy()
        spoilt[place] = bad
        given = framework.train(held, {"w": spoilt})
        skipping.update(*given)
        with pytest.raises(NonFiniteError, match="'w' holds"):
            raising.update(*given)
        given = framework.train(held, good)
        for ema in (skipping, raising):
            np.testing.assert_array_equal(ema.shadow["w"], good["w"])
            ema.update(*given)
            np.testing.assert_array_equal(ema.shadow["w"], good["w"])
    assert (skipping.num_updates, skipping.num_skipped) == (3, 3)


@pytest.mark.parametrize("stored", [None, "bfloat16", "bf16+16"])
def test_resumed_run_equals_the_first_to_the_bit(framework: Framework, stored: str | None) -> None:
    held, later = framework.make_all(values(0)), framework.make_all(values(99))
    ema = fastema.EMA(held, fastema.rules.warmup(0.99), shadow_dtype=stored, seed=3)
    for n in range(1, 5):
        ema.update(*framework.train(held, values(n)))
    state = ema.state_dict()
    assert all(type(one) is np.ndarray for one in state.values())
    with ema.swapped():
        while_applied = ema.state_dict()
    assert framework.bits(while_applied) == framework.bits(state)
    other = fastema.EMA(later, 0.5, shadow_dtype=stored)
    other.load_state_dict(while_applied)
    assert framework.bits(other.shadow) == framework.bits(ema.shadow)
    for n in range(5, 9):
        for weights, one in ((held, ema), (later, other)):
            one.update(*framework.train(weights, values(n)))
    assert framework.bits(other.shadow) == framework.bits(ema.shadow)
    assert other.num_updates == 8
