from __future__ import annotations

import pytest

from fastema.bridges.names import plain_names


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        ([], []),
        (["fc.weight"], ["fc.weight"]),
        (["_orig_mod.fc.weight", "_orig_mod.b"], ["fc.weight", "b"]),
        (["module.fc.weight", "module.b"], ["fc.weight", "b"]),
        (["module.module.a", "module.module.b"], ["a", "b"]),
        (["_orig_mod.module.a.b"], ["a.b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["layers.0._fsdp_wrapped_module.w"], ["layers.0.w"]),
        (["layers._checkpoint_wrapped_module.0._orig_mod.w"], ["layers.0.w"]),
        # A real submodule of that name, beside others.
        (["module.a", "head"], ["module.a", "head"]),
        # The parameter itself is called so.
        (["module", "module"], ["module", "module"]),
        (["module.module", "module.a"], ["module", "a"]),
        # Two wrapped ones that would become equal.
        (["a._orig_mod.w", "a.w"], ["a._orig_mod.w", "a.w"]),
    ],
)
def test_wrappers_do_not_show(names: list[str], plain: list[str]) -> None:
    assert plain_names(names) == plain
