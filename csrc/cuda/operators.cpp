// The operators of `gengram_native` for CUDA: the device, its current stream, memory to work in, sorting. Compiled only
// where PyTorch is built for CUDA; the kernels themselves do not need PyTorch.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../operator_functions.h"
#include "kernels.h"

namespace gengram {
namespace {

void check(int code) { C10_CUDA_CHECK(static_cast<cudaError_t>(code)); }

// The device of a tensor, for as long as this lives, and its current stream.
struct OnDevice {
  explicit OnDevice(const Tensor& like) : guard(like.device()), stream(c10::cuda::getCurrentCUDAStream().stream()), like(like) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  const Tensor& like;

  Tensor ints(int64_t count) const { return at::empty({count}, like.options().dtype(at::kInt)); }
  Tensor bytes(int64_t count) const { return at::empty({count}, like.options().dtype(at::kByte)); }
};

struct Cuda {
  static void plan(const int64_t* codes, const int32_t* behind, int64_t batch, int64_t tokens, int largest, int32_t* grams,
                   int32_t* runs, const Tensor& like) {
    const OnDevice device(like);
    Tensor space = device.bytes(gengram_cuda_plan_bytes(batch, tokens));
    check(gengram_cuda_plan(codes, behind, batch, tokens, largest, grams, runs, space.mutable_data_ptr(), device.stream));
  }

  static void forward(const ForwardArguments& a, const Tensor& like) {
    const OnDevice device(like);
    check_place(a.source, a.layer);
    Tensor space = device.bytes(gengram_cuda_forward_bytes(&a));
    check(gengram_cuda_forward(&a, space.mutable_data_ptr(), device.stream));
  }

  static void backward(const BackwardArguments& a, const Tensor& like) {
    const OnDevice device(like);
    check_place(a.source, a.layer);
    const int64_t entries = gengram_cuda_row_entries(&a);
    TORCH_CHECK(entries < int64_t(1) << 31, "a batch of ", a.tokens.batch * a.tokens.length, " tokens is too large for one backward pass");
    Tensor keys = device.ints(entries), order;
    if (a.source.tables) {
      check(gengram_cuda_row_keys(&a, keys.mutable_data_ptr<int32_t>(), device.stream));
      std::tie(keys, order) = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    }
    Tensor space = device.bytes(gengram_cuda_backward_bytes(&a));
    check(gengram_cuda_backward(&a, keys.const_data_ptr<int32_t>(), order.defined() ? order.const_data_ptr<int64_t>() : nullptr,
                                space.mutable_data_ptr(), device.stream));
  }

  static void features(const FeatureArguments& a, const Tensor& like) {
    const OnDevice device(like);
    check(gengram_cuda_features(&a, device.stream));
  }

  static void features_backward(const FeatureArguments& a, const Tensor& like) {
    const OnDevice device(like);
    Tensor space = device.bytes(gengram_cuda_features_backward_bytes(&a));
    for (int64_t table = 0; table < a.tables; table++) {
      Tensor keys = device.ints(a.tokens.batch * a.tokens.tokens), order;
      check(gengram_cuda_table_keys(&a, table, keys.mutable_data_ptr<int32_t>(), device.stream));
      std::tie(keys, order) = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
      check(gengram_cuda_features_backward(&a, table, keys.const_data_ptr<int32_t>(), order.const_data_ptr<int64_t>(),
                                           space.mutable_data_ptr(), device.stream));
    }
  }

  static Tensor rows_for_backward(const Tensor& rows) { return rows.to(at::kFloat); }

  // Given keys and values are float32, or of the type of the hidden states.
  static void prepare_given(Inputs& in) {
    if (in.key.scalar_type() == in.hidden_states.scalar_type()) return;
    in.key = in.key.to(at::kFloat);
    in.value = in.value.to(at::kFloat);
  }

 private:
  // Threads read four numbers at once.
  static void check_place(const Source& source, const Layer& layer) {
    if (!source.tables) return;
    const Tables& t = *source.tables;
    TORCH_CHECK(t.row_stride % 4 == 0 && t.slab_stride % 4 == 0 && t.slab_width % 4 == 0 && reinterpret_cast<uintptr_t>(t.rows) % 16 == 0 &&
                    layer.hidden % t.slab_width == 0,
                "packed tables must be aligned to 16 bytes, their strides and slabs multiples of 4 numbers");
  }
};

}  // namespace

GENGRAM_IMPLEMENT(GENGRAM_LIBRARY, CUDA, m) { Operators<Cuda>::implement(m); }

}  // namespace gengram
