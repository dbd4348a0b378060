// Schemas of `gengram_native`, and the checks of their arguments, shared by the CPU's and CUDA's operators.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

// The name under which the operators are registered; the builder of Hugging Face's kernels (build.toml) gives one.
#if defined(GENGRAM_BUILDER)
#define GENGRAM_LIBRARY TORCH_EXTENSION_NAME
#else
#define GENGRAM_LIBRARY gengram_native
#endif
#define GENGRAM_REGISTER(library, m) TORCH_LIBRARY(library, m)
#define GENGRAM_IMPLEMENT(library, device, m) TORCH_LIBRARY_IMPL(library, device, m)

namespace gengram {

using at::Tensor;

#define GENGRAM_WINDOW_SCHEMA "int[] sizes, int window, int last"
#define GENGRAM_LAYER_SCHEMA "float eps, int dilation, int reach_back"
#define GENGRAM_FOLDED_SCHEMA                                                                                            \
  "Tensor hidden_states, Tensor rows, Tensor grams, Tensor runs, Tensor? top, Tensor? behind, Tensor? ahead, "           \
  "Tensor? exists, Tensor norm_weight, Tensor? conv_weight, Tensor? history, " GENGRAM_WINDOW_SCHEMA                     \
  ", float scale, " GENGRAM_LAYER_SCHEMA
#define GENGRAM_GATED_SCHEMA                                                                                             \
  "Tensor hidden_states, Tensor key, Tensor value, Tensor? exists, Tensor? behind, Tensor? ahead, Tensor norm_weight, "  \
  "Tensor? conv_weight, Tensor? history, " GENGRAM_LAYER_SCHEMA

inline void define_operators(torch::Library& m) {
  m.def("ngram_plan(Tensor codes, Tensor? behind, int largest) -> (Tensor, Tensor)");
  m.def("folded_memory(" GENGRAM_FOLDED_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("folded_memory_backward(Tensor grad_residual, Tensor? grad_gate, " GENGRAM_FOLDED_SCHEMA
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_memory(" GENGRAM_GATED_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("gated_memory_backward(Tensor grad_residual, Tensor? grad_gate, " GENGRAM_GATED_SCHEMA
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("window_features(Tensor[] tables, Tensor grams, Tensor runs, Tensor? behind, Tensor? ahead, " GENGRAM_WINDOW_SCHEMA
        ", int length) -> Tensor");
  m.def("quantized_product(Tensor x, Tensor numbers, Tensor scale) -> Tensor");
  m.def("window_features_backward(Tensor grad, Tensor grams, Tensor runs, Tensor? behind, Tensor? ahead, " GENGRAM_WINDOW_SCHEMA
        ") -> Tensor[]");
}

#define GENGRAM_FOLDED_PARAMETERS(history)                                                                               \
  const Tensor &hidden_states, const Tensor &rows, const Tensor &grams, const Tensor &runs,                              \
      const std::optional<Tensor>&top, const std::optional<Tensor>&behind, const std::optional<Tensor>&ahead,            \
      const std::optional<Tensor>&exists, const Tensor &norm_weight, const std::optional<Tensor>&conv_weight, history,   \
      at::IntArrayRef sizes, int64_t window, int64_t last, double scale, double eps, int64_t dilation, int64_t reach_back
#define GENGRAM_FOLDED_ARGUMENTS                                                                                         \
  hidden_states, rows, grams, runs, top, behind, ahead, exists, norm_weight, conv_weight, sizes, window, last, scale, eps, \
      dilation, reach_back
#define GENGRAM_GATED_PARAMETERS(history)                                                                                \
  const Tensor &hidden_states, const Tensor &key, const Tensor &value, const std::optional<Tensor>&exists,               \
      const std::optional<Tensor>&behind, const std::optional<Tensor>&ahead, const Tensor &norm_weight,                  \
      const std::optional<Tensor>&conv_weight, history, double eps, int64_t dilation, int64_t reach_back
#define GENGRAM_GATED_ARGUMENTS \
  hidden_states, key, value, exists, behind, ahead, norm_weight, conv_weight, eps, dilation, reach_back

struct CheckedTokens {
  Tensor grams, runs, top, behind, ahead, exists;
  int64_t length;
};

struct CheckedWindows {
  int window, largest, last;
  uint32_t sizes;
};

struct CheckedLayer {
  Tensor norm_weight, taps;  // taps (taps, hidden), undefined without convolution
  int64_t tap_count, dilation, reach_back;
  float eps;
  int64_t reach() const { return tap_count ? (tap_count - 1) * dilation : 0; }
};

struct CheckedTables {
  Tensor rows;
  int64_t top_rows;
  float scale;
};

struct Inputs {
  Tensor hidden_states, key, value;
  CheckedTokens tokens;
  CheckedWindows windows;
  CheckedLayer layer;
  CheckedTables tables;
};

struct Outputs {
  Tensor residual, gate, gated;
};

using CheckedHistory = Tensor;

// Contiguous, and where vectors of 16 bytes may be read.
inline Tensor dense(const Tensor& x) {
  const Tensor y = x.contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? y.clone() : y;
}

inline void check_largest(int64_t largest) {
  TORCH_CHECK(largest >= 1 && largest <= 8, "n-gram sizes must be 1 to 8, got ", largest);
}

inline Tensor check_codes(const Tensor& codes) {
  TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kLong, "codes must be int64 (batch, length), got ",
              codes.scalar_type(), " ", codes.sizes());
  return codes.contiguous();
}

inline Tensor check_reach(const std::optional<Tensor>& x, const Tensor& like, const char* name) {
  if (!x) return Tensor();
  TORCH_CHECK(x->scalar_type() == at::kInt && x->sizes() == like.sizes() && x->device() == like.device(), name,
              " must be int32 ", like.sizes(), ", got ", x->scalar_type(), " ", x->sizes());
  return x->contiguous();
}

inline CheckedTokens check_tokens(const Tensor& grams, const Tensor& runs, const std::optional<Tensor>& top,
                                  const std::optional<Tensor>& behind, const std::optional<Tensor>& ahead,
                                  const std::optional<Tensor>& exists, int64_t length) {
  TORCH_CHECK(grams.dim() == 2 && grams.scalar_type() == at::kInt && grams.size(1) >= length && length >= 0,
              "grams must be int32 (batch, context + length) with length ", length, ", got ", grams.scalar_type(), " ", grams.sizes());
  CheckedTokens t;
  t.grams = grams.contiguous();
  t.runs = check_reach(runs, grams, "runs");
  t.top = check_reach(top, grams, "top");
  t.behind = check_reach(behind, grams, "behind");
  const Tensor current = grams.narrow(1, grams.size(1) - length, length);
  t.ahead = check_reach(ahead, current, "ahead");
  if (exists) {
    TORCH_CHECK(exists->scalar_type() == at::kBool && exists->sizes() == current.sizes(), "exists must be bool ",
                current.sizes(), ", got ", exists->scalar_type(), " ", exists->sizes());
    t.exists = exists->contiguous();
  }
  t.length = length;
  return t;
}

inline CheckedWindows check_windows(at::IntArrayRef sizes, int64_t window, int64_t last) {
  CheckedWindows w{int(window), 0, int(last), 0};
  TORCH_CHECK(!sizes.empty(), "n-gram sizes are missing");
  for (int64_t n : sizes) {
    check_largest(n);
    w.sizes |= 1u << n;
    w.largest = std::max(w.largest, int(n));
  }
  TORCH_CHECK(window >= w.largest && window <= 1 << 20 && last >= 0 && last < window, "a window of ", window,
              " tokens that reaches ", last, " ahead does not fit n-grams of up to ", w.largest);
  return w;
}

inline CheckedLayer check_layer(const Tensor& norm_weight, const std::optional<Tensor>& conv_weight, int64_t hidden, double eps,
                                int64_t dilation, int64_t reach_back) {
  TORCH_CHECK(hidden > 0 && hidden % 16 == 0, "the hidden size must be a multiple of 16, got ", hidden);
  TORCH_CHECK(norm_weight.scalar_type() == at::kFloat && norm_weight.dim() == 1 && norm_weight.size(0) == hidden,
              "norm_weight must be float32 (", hidden, ",), got ", norm_weight.scalar_type(), " ", norm_weight.sizes());
  CheckedLayer l{dense(norm_weight), Tensor(), 0, dilation, reach_back, float(eps)};
  if (!conv_weight) return l;
  TORCH_CHECK(conv_weight->scalar_type() == at::kFloat && conv_weight->dim() == 2 && conv_weight->size(0) == hidden && conv_weight->size(1) > 0,
              "conv_weight must be float32 (", hidden, ", taps), got ", conv_weight->scalar_type(), " ", conv_weight->sizes());
  l.taps = dense(conv_weight->t());
  l.tap_count = conv_weight->size(1);
  TORCH_CHECK(dilation >= 1 && reach_back >= 0 && reach_back <= l.reach(), "taps ", dilation, " apart cannot reach back ", reach_back);
  return l;
}

inline Tensor check_states(const Tensor& hidden_states) {
  TORCH_CHECK(hidden_states.dim() == 3, "hidden states must be (batch, length, hidden), got ", hidden_states.sizes());
  return dense(hidden_states);
}

inline CheckedHistory check_history(const std::optional<Tensor>& history, const Inputs& in) {
  if (!history) return Tensor();
  const int64_t batch = in.hidden_states.size(0), hidden = in.hidden_states.size(2);
  TORCH_CHECK(history->dim() == 3 && history->size(0) == batch && history->size(1) == in.layer.reach_back && history->size(2) == hidden,
              "history must be (", batch, ", ", in.layer.reach_back, ", ", hidden, "), got ", history->sizes());
  return dense(history->to(at::kFloat));
}

inline Inputs check_folded(const Tensor& hidden_states, const Tensor& rows, const Tensor& grams, const Tensor& runs,
                           const std::optional<Tensor>& top, const std::optional<Tensor>& behind, const std::optional<Tensor>& ahead,
                           const std::optional<Tensor>& exists, const Tensor& norm_weight, const std::optional<Tensor>& conv_weight,
                           at::IntArrayRef sizes, int64_t window, int64_t last, double scale, double eps, int64_t dilation,
                           int64_t reach_back) {
  Inputs in;
  in.hidden_states = check_states(hidden_states);
  const int64_t hidden = hidden_states.size(2);
  in.tokens = check_tokens(grams, runs, top, behind, ahead, exists, hidden_states.size(1));
  TORCH_CHECK(grams.size(0) == hidden_states.size(0), "grams and hidden states differ in their batch: ", grams.sizes(), ", ", hidden_states.sizes());
  in.windows = check_windows(sizes, window, last);
  in.layer = check_layer(norm_weight, conv_weight, hidden, eps, dilation, reach_back);
  int64_t others = 0, power = 1;
  for (int n = 1; n < in.windows.largest; n++) others += power *= 5;
  others += in.windows.largest > 1 ? power : 0;
  TORCH_CHECK(rows.dim() == 3 && rows.size(0) * rows.size(2) == 2 * hidden && rows.size(1) > others && hidden % rows.size(2) == 0,
              "packed tables must be (slabs, rows, slab width) with 2 * ", hidden, " columns in all and more than ", others,
              " rows, got ", rows.sizes());
  in.tables.rows = rows.stride(2) == 1 ? rows : dense(rows);
  in.tables.top_rows = rows.size(1) - others;
  TORCH_CHECK(top || in.tables.top_rows == power * 5, "packed tables of some rows need `top`: expected ",
              others, " and 5^", in.windows.largest, " rows, got ", rows.size(1));
  in.tables.scale = float(scale);
  return in;
}

inline Inputs check_gated(const Tensor& hidden_states, const Tensor& key, const Tensor& value, const std::optional<Tensor>& exists,
                          const std::optional<Tensor>& behind, const std::optional<Tensor>& ahead, const Tensor& norm_weight,
                          const std::optional<Tensor>& conv_weight, double eps, int64_t dilation, int64_t reach_back) {
  Inputs in;
  in.hidden_states = check_states(hidden_states);
  TORCH_CHECK(key.sizes() == hidden_states.sizes() && value.sizes() == hidden_states.sizes() && key.scalar_type() == value.scalar_type(),
              "key and value must have one dtype and the shape of the hidden states, ", hidden_states.sizes(), "; got ", key.sizes(), " and ", value.sizes());
  in.key = dense(key);
  in.value = dense(value);
  const Tensor none = at::zeros({hidden_states.size(0), hidden_states.size(1)}, hidden_states.options().dtype(at::kInt));
  in.tokens = check_tokens(none, none, std::nullopt, behind, ahead, exists, hidden_states.size(1));
  in.windows = {1, 1, 0, 2u};
  in.layer = check_layer(norm_weight, conv_weight, hidden_states.size(2), eps, dilation, reach_back);
  return in;
}

inline std::vector<Tensor> check_tables(at::TensorList tables, at::IntArrayRef sizes) {
  TORCH_CHECK(tables.size() == sizes.size(), "expected one table per n-gram size, got ", tables.size(), " for ", sizes.size());
  std::vector<Tensor> out;
  for (size_t i = 0; i < tables.size(); i++) {
    int64_t rows = 1;
    for (int64_t n = 0; n < sizes[i]; n++) rows *= 5;
    const Tensor& t = tables[i];
    TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == tables[0].size(1) && t.size(1) % 16 == 0 && t.scalar_type() == tables[0].scalar_type(),
                "the table of ", sizes[i], "-grams must be (", rows, ", width), the width a multiple of 16 and all of one dtype; got ", t.sizes());
    out.push_back(dense(t));
  }
  return out;
}

}  // namespace gengram
