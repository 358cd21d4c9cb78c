// The CUDA half of the extension on the CPU, as the operations `complora_emulated::…`.

#include "cuda_runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns##_emulated, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_emulated, CPU, m, C10_UID)

#include "complement_cuda.cu"
#include "registration.cpp"

// What a CPU build of torch has not, or not for the CPU.
extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == cudaSuccess ? nullptr : strdup(("CUDA error " + std::to_string(error)).c_str());
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) { free(message); }

// For the tests: the order of threads and blocks from now on, an error for the next launch, launches so far.
__attribute__((visibility("default"))) void set_seed(uint64_t seed) { cuda_on_cpu::seed = seed; }
__attribute__((visibility("default"))) void set_next_error(int error) { cuda_on_cpu::next_error = error; }
__attribute__((visibility("default"))) int64_t launches() { return cuda_on_cpu::launches; }
}
