// The operators of `gengram_native` for the CPU: checks, memory, and the choice of an instruction set.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../operator_functions.h"
#include "kernels.h"

#ifndef GENGRAM_TORCH_VERSION  // `setup.py` says which it is
#define GENGRAM_TORCH_VERSION "unknown"
#endif

namespace gengram {
namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = [&]() -> const Kernels& {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return kernels_avx512();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? kernels_avx2() : kernels_baseline();
  }();
  return chosen;
#else
  return kernels_baseline();
#endif
}

void parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

struct Cpu {
  static void plan(const int64_t* codes, const int32_t* behind, int64_t batch, int64_t tokens, int largest, int32_t* grams,
                   int32_t* runs, const Tensor&) {
    kernels().plan(codes, behind, batch, tokens, largest, grams, runs, parallel);
  }
  static void forward(const ForwardArguments& a, const Tensor&) { kernels().forward(a, parallel); }
  static void backward(const BackwardArguments& a, const Tensor&) { kernels().backward(a, parallel); }
  static void features(const FeatureArguments& a, const Tensor&) { kernels().features(a, parallel); }
  static void features_backward(const FeatureArguments& a, const Tensor&) { kernels().features_backward(a, parallel); }
  static Tensor rows_for_backward(const Tensor& rows) { return rows; }
  static void prepare_given(Inputs&) {}
};

Tensor quantized_product(const Tensor& x, const Tensor& numbers, const Tensor& scale) {
  const bool is_int4 = numbers.scalar_type() == at::kByte;
  TORCH_CHECK(is_int4 || numbers.scalar_type() == at::kChar, "numbers must be int8 or uint8, got ", numbers.scalar_type());
  TORCH_CHECK(x.dim() == 2 && numbers.dim() == 2 && x.size(1) == numbers.size(1) * (is_int4 ? 2 : 1),
              "x must be (tokens, columns) and numbers (rows, columns), got ", x.sizes(), " and ", numbers.sizes());
  const int64_t tokens = x.size(0), columns = x.size(1), rows = numbers.size(0);
  TORCH_CHECK(columns % (is_int4 ? 32 : 16) == 0, "columns must be a multiple of ", is_int4 ? 32 : 16, ", got ", columns);
  TORCH_CHECK(scale.scalar_type() == x.scalar_type(), "scale must be ", x.scalar_type(), ", got ", scale.scalar_type());
  TORCH_CHECK(scale.numel() == rows * (is_int4 ? columns / 32 : 1), "scale has ", scale.numel(), " numbers for ", rows, " rows");
  const Tensor own = x.contiguous(), weights = numbers.contiguous(), scales = scale.contiguous();
  Tensor out = at::empty({tokens, rows}, x.options());
  if (out.numel())
    kernels().product({own.const_data_ptr(), weights.const_data_ptr(), scales.const_data_ptr(), out.mutable_data_ptr(), type_of(x),
                       tokens, rows, columns, is_int4},
                      parallel);
  return out;
}

std::string capability() { return kernels().name; }

}  // namespace

// Read from the file before it is loaded (motif_memory/ways/native.py): PyTorch's binary interface changes between versions.
extern "C" __attribute__((used, visibility("default"))) const char gengram_built_with[] =
    "gengram native kernels, built with torch " GENGRAM_TORCH_VERSION ";";

GENGRAM_REGISTER(GENGRAM_LIBRARY, m) {
  define_operators(m);
  m.def("capability() -> str", capability);
}

GENGRAM_IMPLEMENT(GENGRAM_LIBRARY, CPU, m) {
  Operators<Cpu>::implement(m);
  m.impl("quantized_product", quantized_product);
}

}  // namespace gengram
