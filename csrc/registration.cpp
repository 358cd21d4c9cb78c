// Every schema of the extension. `complement.h` says what each operation computes; `complement_cpu.cpp` and
// `complement_cuda.cu` register it for their device. None has a gradient: `complora_kernels/autograd.py` gives it one.

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(complora, m) {
  m.def("project_complement(Tensor factor, Tensor basis, bool complement) -> Tensor");
  m.def(
      "fold_factors(Tensor[] factors, Tensor?[] bases, bool[] complement, bool[] output_side, float scaling, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "packed_lora_linear_factor_grads(Tensor dY, Tensor x, Tensor h, Tensor g, int[] starts, int height, "
      "float dropout_p, Tensor? seed, bool[] needs) -> (Tensor, Tensor)");
  m.def("drop(Tensor x, Tensor seed, int adapter, float dropout_p) -> Tensor");
}

// `import complora_kernels._C` loads the library, which registers the operations; there is nothing else in it.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
