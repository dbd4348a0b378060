// What the CPU's operators call: plain pointers and numbers, so that the kernels can be compiled for several
// instruction sets without sharing inline code.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace gengram {

// Runs body(context, begin, end) over pieces of 0..count in several threads.
using Parallel = void (*)(int64_t count, void (*body)(void*, int64_t, int64_t), void* context);

struct Kernels {
  const char* name;
  void (*plan)(const int64_t* codes, const int32_t* behind, int64_t batch, int64_t tokens, int largest, int32_t* grams,
               int32_t* runs, Parallel parallel);
  void (*forward)(const ForwardArguments&, Parallel);
  void (*backward)(const BackwardArguments&, Parallel);
  void (*features)(const FeatureArguments&, Parallel);
  void (*features_backward)(const FeatureArguments&, Parallel);
  void (*product)(const ProductArguments&, Parallel);
};

const Kernels& kernels_avx512();
const Kernels& kernels_avx2();
const Kernels& kernels_baseline();

// Columns that lie together in packed tables, and that one thread handles at a time.
inline int64_t slab_width(int64_t hidden) {
  for (int64_t width = 256; width > 16; width /= 2)
    if (hidden % width == 0) return width;
  return 16;
}

}  // namespace gengram
