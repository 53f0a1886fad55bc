"""Calls of the CUDA driver, against a stub that records them.

Each script runs in its own process, where ctypes loads the stub as `libcuda.so.1`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.requirements import require

require(sys.platform == "linux", "a libcuda.so.1, which is Linux's,")

SOURCE = Path(__file__).with_name("stub_libcuda.c")

Script = Callable[..., str]

PRELUDE = """
    import ctypes, os, threading
    from ctypes import c_char, c_int64, c_ubyte, c_uint64

    import numpy as np
    from fastema.engine import cuda as engine
    from fastema.engine.step_counter import StepCounter
    from fastema.engine.cubins import Cubin, Key, Unavailable
    from fastema.engine.cuda import Device, device
    from fastema.layout.device_context import LaunchArgs
    from fastema.engine.program import Program
    from fastema.errors import DeviceError
    from fastema.layout.group import Pair
    from tests.support.arrays import spec_of

    class Call(ctypes.Structure):
        _fields_ = [("function", c_char * 40), ("text", c_char * 200), ("count", c_int64),
                    ("values", c_uint64 * 40)]

    library = ctypes.CDLL("libcuda.so.1")
    noted = (Call * 4096).in_dll(library, "stub_calls")
    count = c_int64.in_dll(library, "stub_count")
    parameters = c_int64.in_dll(library, "stub_parameters")
    image = (c_ubyte * (1 << 20)).in_dll(library, "stub_image")
    image_size = c_int64.in_dll(library, "stub_image_size")
    failing = (c_char * 40).in_dll(library, "stub_failing")
    error = c_int64.in_dll(library, "stub_error")
    parameters.value = 17

    def take():
        '''Return the calls since the last take: function, text, values.'''
        found = [(c.function.decode(), c.text.decode(), list(c.values[:c.count]))
                 for c in noted[:count.value]]
        count.value = 0
        return found

    def names():
        return [function for function, _, _ in take()]

    def fail(function, code):
        failing.value, error.value = function.encode(), code

    # Seventeen parameters, and the array of pointers to them that a launch takes.
    values = np.arange(17)
    places = values.ctypes.data + 8 * np.arange(17)
    address = int(places.ctypes.data)

    FIRST, SECOND = 0xC0000, 0xC0001  # the contexts of the devices
    KEY = Key("lerp", ("f32", "bf16"), "flat", (9, 0))
    CODE = np.random.default_rng(3).bytes(50_001)  # any bytes, zeros included
    assert b"\\0" in CODE

    def compiled(key):
        return Cubin(f"kernel_of_{key.operation}_{key.layout}", CODE)

    engine.cubin = compiled
    image_size.value = len(CODE)

    class DeviceContext:
        '''A device whose memory is host memory.'''

        fallback_reason = None

        def __init__(self, index, handle):
            self.index, self.device, self.handle = index, f"cuda:{index}", handle
            self.uploaded = []

        stream = lambda self: self.handle
        capturing = lambda self: False
        defer_reuse = lambda self, owners: True

        def upload(self, array):
            self.uploaded.append(array.copy())
            return self.uploaded[-1], self.uploaded[-1].ctypes.data

        def write(self, owner, array):
            owner[...] = array

    def spec(array, home):
        return spec_of(array, "f32", home.device, context=home)

    def pairs(home, *shapes):
        return [Pair(f"t{k}", spec(np.zeros(shape, np.float32), home),
                     spec(np.ones(shape, np.float32), home)) for k, shape in enumerate(shapes)]
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the stub and return its folder."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    require(compiler, "a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        [
            *(str(compiler), "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"),
            *("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"),
            *("-o", str(folder / "libcuda.so.1"), str(SOURCE), "-ldl"),
        ],
        check=True,
    )
    return folder


@pytest.fixture
def run(driver: Path, python: Script) -> Script:
    """Return a function that runs a script after :data:`PRELUDE` and returns its output."""
    path = os.pathsep.join(filter(None, [str(driver), os.environ.get("LD_LIBRARY_PATH", "")]))
    return lambda script, **more: python(PRELUDE + script, LD_LIBRARY_PATH=path, **more)


def test_each_device_and_each_kernel_is_loaded_once_and_whole(run: Script) -> None:
    run("""
    one = device(0)
    assert one.capability == (9, 0)
    assert take() == [
        ("cuInit", "", [0]),
        ("cuDeviceGet", "", [0]),
        ("cuDeviceGetAttribute", "", [75, 0]),
        ("cuDeviceGetAttribute", "", [76, 0]),
        ("cuDeviceGet", "", [0]),
        ("cuDevicePrimaryCtxRetain", "", [0]),
    ]
    assert device(0) is one
    assert take() == []
    function = one.function(KEY)
    calls = take()
    assert [name for name, _, _ in calls] == [
        "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuModuleLoadData", "cuModuleGetFunction",
        "cuCtxPopCurrent_v2",
    ]
    assert calls[1][2] == [FIRST]
    assert calls[2][2] == [FIRST]  # loaded into the device's context
    assert bytes(image[:len(CODE)]) == CODE
    assert calls[3][1] == "kernel_of_lerp_flat"
    assert calls[3][2] == [0xD0001]  # the module that was loaded
    assert int(function) == 0xF0001
    assert one.function(KEY) is function
    assert take() == []
    assert int(one.function(KEY._replace(layout="strided"))) == 0xF0002
    assert [text for name, text, _ in take() if name == "cuModuleGetFunction"] == [
        "kernel_of_lerp_strided"
    ]
    assert device(1).capability == (12, 0)
    """)


def test_an_update_of_many_tensors_is_one_launch(run: Script) -> None:
    """The kernel finds the program's table, numbers and moment in its seventeen parameters."""
    run("""
    home = DeviceContext(0, 0x7F00DEADBEE0)
    members = pairs(home, (3, 5), (70_000,), (), (33,))
    program = Program({"all": members})
    program.run({"all": "lerp"}, LaunchArgs((0.25,), 11, 2**40 + 7, 3, 2, 9))
    first = take()
    program.run({"all": "lerp"}, LaunchArgs((-0.5,), 12, 13))
    second = take()
    assert [name for name, _, _ in second] == ["cuCtxGetCurrent", "cuCtxPushCurrent_v2",
                                               "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    (table,) = home.uploaded
    for calls, number, now in ((first, 0.25, [11, 2**40 + 7, 3, 2, 9]),
                               (second, -0.5, [12, 13, 0, 0, 0])):
        (given,) = [values for name, _, values in calls if name == "cuLaunchKernel"]
        function, blocks, _, _, threads, _, _, shared, stream, extra, context, *rest = given
        assert (blocks, threads, shared, stream) == (len(table), 256, 0, home.handle)
        assert (extra, context) == (0, FIRST)
        assert rest[:4] == [table.ctypes.data, len(table), 0, 0]
        numbers = np.array(rest[4:12], np.uint64).view(np.float64)
        assert numbers.tolist() == [number] + [0.0] * 7
        assert rest[12:] == now
    """)


def test_shipped_kernels_need_only_the_driver(run: Script, tmp_path: Path) -> None:
    run(
        """
    import sys
    from pathlib import Path

    from fastema.engine import cubins, shipped
    from fastema.kernels.stamp import source_stamp

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("numba_cuda", "cuda"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())
    shipped.FOLDER = Path(os.environ["FOLDER"])
    code = {(("f32", "f32"), "flat"): CODE, (("raw4", "raw4"), "flat"): b"another"}
    shipped.write(shipped.FOLDER / "gpu" / "sm_90" / "lerp.xz", code)
    (shipped.FOLDER / "gpu" / "stamp").write_text(source_stamp())
    engine.cubin = cubins.cubin

    home = DeviceContext(0, 5)
    program = Program({"all": pairs(home, (3, 5))})
    program.run({"all": "lerp"}, LaunchArgs((0.25,)))
    calls = take()
    assert bytes(image[:len(CODE)]) == CODE
    assert [text for name, text, _ in calls if name == "cuModuleGetFunction"] == ["fastema_lerp"]
    assert calls[-2][0] == "cuLaunchKernel"
    assert not {"cuda", "numba_cuda", "numba.cuda"} & set(sys.modules)
    try:
        device(0).function(KEY)
    except Unavailable as error:
        assert "could not be compiled" in str(error)
    """,
        FOLDER=str(tmp_path),
    )


def test_a_launch_restores_the_current_context(run: Script) -> None:
    run("""
    one, two = device(0), device(1)
    functions = [one.function(KEY), two.function(KEY)]

    def launched_in():
        take()
        one.launch(functions[0], 1, 256, 0, address)
        two.launch(functions[1], 1, 256, 0, address)
        calls = take()
        contexts = [values[10] for name, _, values in calls if name == "cuLaunchKernel"]
        pushes = [values[0] for name, _, values in calls if name == "cuCtxPushCurrent_v2"]
        assert sum(name == "cuCtxPopCurrent_v2" for name, _, _ in calls) == len(pushes)
        return contexts, pushes

    def current():
        return one._driver.current()

    assert current() == 0
    assert launched_in() == ([FIRST, SECOND], [FIRST, SECOND])
    assert current() == 0
    for held, pushed in ((one._context, [SECOND]), (two._context, [FIRST]),
                         (0xABC, [FIRST, SECOND])):
        one._driver.push(held)
        assert launched_in() == ([FIRST, SECOND], pushed)
        assert current() == int(held)
        one._driver.pop()

    found = []

    def in_a_thread():
        found.append(launched_in())
        found.append(current())

    one._driver.push(one._context)
    thread = threading.Thread(target=in_a_thread)  # starts without a current context
    thread.start()
    thread.join()
    assert found == [([FIRST, SECOND], [FIRST, SECOND]), 0]
    assert current() == FIRST
    """)


def test_a_launch_asks_for_the_context_without_releasing_the_lock(run: Script) -> None:
    """Another thread could keep the interpreter's lock for milliseconds."""
    run("""
    one = device(0)
    function = one.function(KEY)
    take()
    for _ in range(3):
        one.launch(function, 1, 256, 0, address)
    asked = [values for name, _, values in take() if name == "cuCtxGetCurrent"]
    assert asked == [[1], [1], [1]]
    """)


def test_a_missing_driver_raises_a_one_line_message(python: Script, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    message = python(
        """
    from fastema.engine.cubins import Unavailable
    from fastema.engine.cuda import device
    try:
        device(0)
    except Unavailable as error:
        print(str(error).replace(chr(10), "<newline>"))
    """,
        LD_LIBRARY_PATH=str(tmp_path),
    ).strip()
    if message:  # empty if another driver was found
        assert message.startswith("the CUDA driver ")
        assert "<newline>" not in message
