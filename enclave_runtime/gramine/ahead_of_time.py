"""Compiles the kernels ahead of time, so that neither Numba nor its LLVM goes into the enclave.

A script: `staging` runs it in an interpreter of its own, since Numba reads its settings as it is
imported, with what it may import and where to write on its standard input. It has Numba compile
every kernel for the types that the enclave uses, wraps each in the C function that
`enclave_runtime.compiled.kernel` describes, has LLVM make one object file of them, and links that
with binutils' `ld`. The same packages give the same bytes on any machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_OPTIMISATION = 3
# LLVM calls this for a loop that clears memory. Volatile, so that it is not such a loop itself.
_MEMSET = """
define hidden ptr @memset(ptr %start, i32 %value, i64 %count) {
entry:
  %byte = trunc i32 %value to i8
  %one = zext i8 %byte to i64
  %word = mul i64 %one, 72340172838076673
  %whole = and i64 %count, -8
  br label %words
words:
  %at = phi i64 [ 0, %entry ], [ %next, %word_stored ]
  %more = icmp ult i64 %at, %whole
  br i1 %more, label %word_stored, label %bytes
word_stored:
  %there = getelementptr i8, ptr %start, i64 %at
  store volatile i64 %word, ptr %there, align 1
  %next = add i64 %at, 8
  br label %words
bytes:
  %last = phi i64 [ %whole, %words ], [ %after, %byte_stored ]
  %left = icmp ult i64 %last, %count
  br i1 %left, label %byte_stored, label %end
byte_stored:
  %here = getelementptr i8, ptr %start, i64 %last
  store volatile i8 %byte, ptr %here, align 1
  %after = add i64 %last, 1
  br label %bytes
end:
  ret ptr %start
}
"""
_WORDS_BEFORE_SHAPE = 5  # of an array; see `enclave_runtime.compiled.kernel`


def build(output: Path, linker: str) -> None:
    """Writes the shared library of all kernels.

    Raises:
      OSError, CalledProcessError: the linker does not run, or fails.
      TypeError: a kernel has an argument of a type that has no words.
    """
    import llvmlite.binding as llvm

    from enclave_runtime.compiled.kernel import PROCESSOR, Kernel
    from enclave_runtime.schemes.kernels import hadamard, residues

    # Calls each kernel with arguments of all types that it is called with.
    hadamard.warm_up()
    residues.warm_up()
    modules = {}
    for kernel in Kernel.known:
        for overload in kernel.dispatcher.overloads.values():
            name, module = _compiled(kernel.name, overload)
            modules[name] = module
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(
        cpu=PROCESSOR, opt=_OPTIMISATION, reloc="pic", codemodel="default"
    )
    names = sorted(modules)
    whole = modules[names[0]]
    for name in names[1:]:
        whole.link_in(modules[name])
    whole.link_in(llvm.parse_assembly(_MEMSET))
    whole.name = "kernels"
    whole.verify()
    passes = llvm.create_pass_builder(
        machine, llvm.create_pipeline_tuning_options(speed_level=_OPTIMISATION)
    )
    passes.getModulePassManager().run(whole, passes)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.o").write_bytes(machine.emit_object(whole))
        options = ["-shared", "-z", "noexecstack", "--build-id=none", "--strip-all"]
        subprocess.run(
            [linker, *options, "-o", str(output.absolute()), "kernels.o"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )


def _compiled(name: str, overload: Any) -> tuple[str, Any]:
    """The symbol of a kernel for certain types, and a module in which only that is visible."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    from enclave_runtime.compiled.kernel import symbol

    types = overload.signature.args
    visible = symbol(name, [part for kind in types for part in _names(kind)])
    module = llvm.parse_assembly(overload.library.get_llvm_str())
    wrapper = ir.Module(visible)
    wrapper.triple, wrapper.data_layout = module.triple, module.data_layout
    words = ir.IntType(64).as_pointer()
    function = ir.Function(wrapper, ir.FunctionType(ir.IntType(32), [words]), visible)
    builder = ir.IRBuilder(function.append_basic_block())
    context = overload.target_context
    reader = _WordReader(context, builder, function.args[0])
    arguments = [reader.read(kind) for kind in types]
    kernel = context.declare_function(wrapper, overload.fndesc)
    status, _ = context.call_conv.call_function(
        builder, kernel, overload.signature.return_type, types, arguments
    )
    builder.ret(status.code)
    module.link_in(llvm.parse_assembly(str(wrapper)))
    for item in [*module.functions, *module.global_variables]:
        # What only kernels use is theirs: it may be inlined, and two may have it under one name.
        if not item.is_declaration and item.name != visible:
            item.linkage = "internal"
    return visible, module


def _names(kind: Any) -> list[str]:
    """How `symbol` names what a type is flattened to."""
    from numba.core import types
    from numba.np import numpy_support

    from enclave_runtime.compiled.kernel import INTEGER, array_type

    if isinstance(kind, types.BaseTuple):
        return [name for part in _parts(kind) for name in _names(part)]
    if isinstance(kind, types.Array):
        return [array_type(numpy_support.as_dtype(kind.dtype), kind.ndim)]
    return [INTEGER]


def _parts(kind: Any) -> list[Any]:
    """The types of a tuple's elements."""
    return list(kind)


class _WordReader:
    """Reads arguments from words, in LLVM's instructions."""

    def __init__(self, context: Any, builder: Any, words: Any):
        self._context, self._builder, self._words = context, builder, words
        self._next = 0

    def _word(self) -> Any:
        from llvmlite import ir

        place = self._builder.gep(self._words, [ir.Constant(ir.IntType(64), self._next)])
        self._next += 1
        return self._builder.load(place)

    def read(self, kind: Any) -> Any:
        """An argument, as Numba's functions take it."""
        from numba.core import types

        context, builder = self._context, self._builder
        if isinstance(kind, types.BaseTuple):
            return context.make_tuple(builder, kind, [self.read(part) for part in _parts(kind)])
        if isinstance(kind, types.Array) and kind.layout == "C":
            array = context.make_array(kind)(context, builder)
            owner, parent, size, item, data = (self._word() for _ in range(_WORDS_BEFORE_SHAPE))
            array.meminfo = builder.inttoptr(owner, array.meminfo.type)
            array.parent = builder.inttoptr(parent, array.parent.type)
            array.nitems, array.itemsize = size, item
            array.data = builder.inttoptr(data, array.data.type)
            axes = types.UniTuple(types.intp, kind.ndim)
            for field in ("shape", "strides"):
                values = [self._word() for _ in range(kind.ndim)]
                setattr(array, field, context.make_tuple(builder, axes, values))
            return array._getvalue()
        if kind == types.intp:
            return self._word()
        raise TypeError(f"{kind} is no argument of a kernel that is compiled ahead of time")


def environment() -> dict[str, str]:
    """The variables with which this script runs: Numba's view of the processor."""
    from enclave_runtime.compiled.kernel import PROCESSOR

    return {"NUMBA_CPU_NAME": PROCESSOR, "NUMBA_CPU_FEATURES": ""}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    sys.path.extend(request["roots"])
    with tempfile.TemporaryDirectory() as cache:
        # What Numba finds cached has no LLVM code left, and may be another processor's.
        os.environ["NUMBA_CACHE_DIR"] = cache
        build(Path(request["output"]), request["linker"])
