"""`kernels/gpu/decode/fused.cu` on a CPU, through `emulator/emulator.cpp`."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from spla_backend.kernels.gpu.decode.fused import SOURCE, FusedDecode

COMPILER = shutil.which("g++")


@functools.cache
def _compile(defines: tuple) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    library = folder / "emulated.so"
    flags = [f"-D{name}={value}" for name, value in defines]
    source = Path(__file__).with_name("emulator") / "emulator.cpp"
    command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{SOURCE.parent}", *flags]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    emulate = ctypes.CDLL(str(library)).emulate
    emulate.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    shutil.rmtree(folder)
    return emulate


class EmulatedDecode(FusedDecode):
    def pays(self, num_rows) -> bool:
        return True

    def _launch(self, arguments, blocks, score_blocks, num_rows) -> None:
        emulate = _compile(tuple(sorted(self._defines(blocks, score_blocks > 0).items())))
        shared = self.shared_bytes(blocks)
        assert emulate(ctypes.byref(arguments), blocks, self.num_kv_heads, num_rows, shared, score_blocks) == 0
