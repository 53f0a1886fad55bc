"""Forked processes, and fresh processes that find their kernels on disk."""

import os
from collections.abc import Callable

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_refused(gpu: torch.device, python: Callable[..., str]) -> None:
    """Its error names the fork, instead of a driver error or a hang."""
    said = python(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch, fastema
        from fastema.errors import FastemaError

        weights = [torch.randn(1000, device="cuda")]
        ema = fastema.EMA(weights, 0.9)
        ema.update()
        torch.cuda.synchronize()
        child = os.fork()
        if not child:
            code = 3
            try:
                ema.update()
            except FastemaError as error:
                code = 0 if "fork" in str(error) else 4
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))
        weights[0].normal_()
        ema.update()  # the parent goes on
        print(bool(ema.shadow["0"].isfinite().all()), ema.num_updates)
        """,
        timeout=120.0,
        quiet=False,
    )
    assert said.split() == ["child", "0", "True", "2"]


def test_a_fresh_process_reuses_kernels(device: torch.device, python: Callable[..., str]) -> None:
    """Both processes compute the same number, the second one with kernels from the disk."""
    script = """
    import sys, warnings
    warnings.simplefilter("error", RuntimeWarning)  # no fallback to slower functions
    import torch, fastema

    torch.manual_seed(3)
    weights = [torch.randn(70_001).bfloat16().to(sys.argv[1])]
    ema = fastema.EMA(weights, 0.9)
    weights[0].mul_(1.5)
    ema.update()
    print(ema.shadow["0"].view(torch.int16).long().cpu().mul(torch.arange(70_001)).sum().item())
    """
    once, again = (python(script, str(device), timeout=120.0, quiet=False) for _ in range(2))
    assert once == again
    assert int(once)
