// The operators of `gengram_native` for any device: checks, memory for the results, and the call of a backend's kernels.
//
// A backend has `plan`, `forward`, `backward`, `features` and `features_backward`, which take plain pointers and a tensor on
// their device, and `rows_for_backward` and `prepare_given`, which convert what its kernels do not take as it is.
#pragma once

#include <tuple>
#include <vector>

#include "arguments.h"
#include "operators.h"

namespace gengram {

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK(false, "expected float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

template <class T>
const T* pointer(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}

inline Tokens tokens_of(const CheckedTokens& t) {
  return {pointer<int32_t>(t.grams), pointer<int32_t>(t.runs),  pointer<int32_t>(t.top), pointer<int32_t>(t.behind),
          pointer<int32_t>(t.ahead), pointer<bool>(t.exists), t.grams.size(0),         t.grams.size(1), t.length};
}

inline Windows windows_of(const CheckedWindows& w) { return {w.window, w.largest, w.last, w.sizes}; }

inline Layer layer_of(const CheckedLayer& l) {
  return {l.norm_weight.size(0), pointer<float>(l.norm_weight), pointer<float>(l.taps), l.tap_count, l.dilation, l.reach_back, l.eps};
}

inline Tables tables_of(const CheckedTables& t) {
  return {t.rows.const_data_ptr(), type_of(t.rows), t.top_rows, t.rows.stride(1), t.rows.stride(0), t.rows.size(2), t.scale};
}

template <class Backend>
Outputs run_forward(const Inputs& in, const Source& source, const std::optional<Tensor>& history) {
  const int64_t batch = in.hidden_states.size(0), length = in.hidden_states.size(1), hidden = in.hidden_states.size(2);
  const CheckedHistory past = check_history(history, in);
  const auto floats = in.hidden_states.options().dtype(at::kFloat);
  Outputs out{at::empty_like(in.hidden_states), at::empty({batch, length}, floats),
              at::empty({batch, std::min(length, in.layer.reach()), hidden}, floats)};
  ForwardArguments a{tokens_of(in.tokens), windows_of(in.windows), source, layer_of(in.layer), in.hidden_states.const_data_ptr(),
                     type_of(in.hidden_states), pointer<float>(past), out.residual.mutable_data_ptr(),
                     out.gate.mutable_data_ptr<float>(), out.gated.mutable_data_ptr<float>(), out.gated.size(1)};
  if (batch && length) Backend::forward(a, in.hidden_states);
  return out;
}

struct Gradients {
  Tensor hidden, rows, key, value, norm, conv;
};

template <class Backend>
Gradients run_backward(const Inputs& in, const Source& source, const Tensor& grad_residual, const std::optional<Tensor>& grad_gate) {
  TORCH_CHECK(grad_residual.sizes() == in.hidden_states.sizes(), "grad_residual must have the shape of hidden states, got ", grad_residual.sizes());
  const Tensor grad = dense(grad_residual.to(in.hidden_states.scalar_type()));
  const Tensor gate = grad_gate ? grad_gate->to(at::kFloat).contiguous() : Tensor();
  const auto floats = in.hidden_states.options().dtype(at::kFloat);
  Gradients out;
  out.hidden = at::empty_like(in.hidden_states);
  out.norm = at::zeros_like(in.layer.norm_weight);
  if (in.layer.taps.defined()) out.conv = at::zeros_like(in.layer.taps);
  if (source.tables)
    out.rows = at::zeros({in.tables.rows.size(0), in.tables.rows.size(1), in.tables.rows.size(2)}, floats);
  else
    out.key = at::empty(in.hidden_states.sizes(), floats), out.value = at::empty(in.hidden_states.sizes(), floats);
  auto data = [](Tensor& x) { return x.defined() ? x.mutable_data_ptr<float>() : nullptr; };
  BackwardArguments a{tokens_of(in.tokens), windows_of(in.windows), source, layer_of(in.layer), grad.const_data_ptr(),
                      in.hidden_states.const_data_ptr(), pointer<float>(gate), type_of(in.hidden_states),
                      out.hidden.mutable_data_ptr(), data(out.rows), data(out.key), data(out.value), data(out.norm), data(out.conv)};
  if (in.hidden_states.numel()) Backend::backward(a, in.hidden_states);
  if (out.conv.defined()) out.conv = out.conv.t().contiguous();
  return out;
}

inline Source given(const Inputs& in) {
  return Source{nullptr, in.key.const_data_ptr(), in.value.const_data_ptr(), type_of(in.key)};
}

inline FeatureArguments feature_arguments(const CheckedTokens& tokens, const CheckedWindows& windows, const std::vector<int>& sizes,
                                          int64_t width, Type type) {
  FeatureArguments a{};
  a.tokens = tokens_of(tokens);
  a.windows = windows_of(windows);
  a.sizes = sizes.data();
  a.tables = int64_t(sizes.size());
  a.width = width;
  a.type = type;
  return a;
}

template <class Backend>
struct Operators {
  static std::tuple<Tensor, Tensor> ngram_plan(const Tensor& codes, const std::optional<Tensor>& behind, int64_t largest) {
    const Tensor letters = check_codes(codes), reach = check_reach(behind, codes, "behind");
    check_largest(largest);
    const auto ints = codes.options().dtype(at::kInt);
    Tensor grams = at::empty(codes.sizes(), ints), runs = at::empty(codes.sizes(), ints);
    if (codes.numel())
      Backend::plan(letters.const_data_ptr<int64_t>(), pointer<int32_t>(reach), codes.size(0), codes.size(1), int(largest),
                    grams.mutable_data_ptr<int32_t>(), runs.mutable_data_ptr<int32_t>(), letters);
    return {grams, runs};
  }

  static std::tuple<Tensor, Tensor, Tensor> folded_memory(GENGRAM_FOLDED_PARAMETERS(const std::optional<Tensor>& history)) {
    const Inputs in = check_folded(GENGRAM_FOLDED_ARGUMENTS);
    const Tables tables = tables_of(in.tables);
    Outputs out = run_forward<Backend>(in, Source{&tables, nullptr, nullptr, Type::kFloat}, history);
    return {out.residual, out.gate, out.gated};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> folded_memory_backward(
      const Tensor& grad_residual, const std::optional<Tensor>& grad_gate,
      GENGRAM_FOLDED_PARAMETERS(const std::optional<Tensor>& history)) {
    TORCH_CHECK(!history, "gradients through a history are not defined");
    Inputs in = check_folded(GENGRAM_FOLDED_ARGUMENTS);
    in.tables.rows = Backend::rows_for_backward(in.tables.rows);
    const Tables tables = tables_of(in.tables);
    Gradients g = run_backward<Backend>(in, Source{&tables, nullptr, nullptr, Type::kFloat}, grad_residual, grad_gate);
    return {g.hidden, g.rows, g.norm, g.conv.defined() ? g.conv : at::empty({0}, g.norm.options())};
  }

  static std::tuple<Tensor, Tensor, Tensor> gated_memory(GENGRAM_GATED_PARAMETERS(const std::optional<Tensor>& history)) {
    Inputs in = check_gated(GENGRAM_GATED_ARGUMENTS);
    Backend::prepare_given(in);
    Outputs out = run_forward<Backend>(in, given(in), history);
    return {out.residual, out.gate, out.gated};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_memory_backward(
      const Tensor& grad_residual, const std::optional<Tensor>& grad_gate,
      GENGRAM_GATED_PARAMETERS(const std::optional<Tensor>& history)) {
    TORCH_CHECK(!history, "gradients through a history are not defined");
    Inputs in = check_gated(GENGRAM_GATED_ARGUMENTS);
    Backend::prepare_given(in);
    Gradients g = run_backward<Backend>(in, given(in), grad_residual, grad_gate);
    return {g.hidden, g.key.to(key.scalar_type()), g.value.to(value.scalar_type()), g.norm,
            g.conv.defined() ? g.conv : at::empty({0}, g.norm.options())};
  }

  static Tensor window_features(at::TensorList tables, const Tensor& grams, const Tensor& runs, const std::optional<Tensor>& behind,
                                const std::optional<Tensor>& ahead, at::IntArrayRef sizes, int64_t window, int64_t last, int64_t length) {
    const CheckedWindows windows = check_windows(sizes, window, last);
    const CheckedTokens tokens = check_tokens(grams, runs, std::nullopt, behind, ahead, std::nullopt, length);
    const std::vector<Tensor> rows = check_tables(tables, sizes);
    std::vector<const void*> pointers;
    for (const Tensor& table : rows) pointers.push_back(table.const_data_ptr());
    const std::vector<int> numbers(sizes.begin(), sizes.end());
    const int64_t width = rows[0].size(1);
    Tensor out = at::empty({grams.size(0), length, int64_t(rows.size()) * width}, rows[0].options());
    FeatureArguments a = feature_arguments(tokens, windows, numbers, width, type_of(rows[0]));
    a.rows = pointers.data();
    a.features = out.mutable_data_ptr();
    if (out.numel()) Backend::features(a, out);
    return out;
  }

  static std::vector<Tensor> window_features_backward(const Tensor& grad, const Tensor& grams, const Tensor& runs,
                                                      const std::optional<Tensor>& behind, const std::optional<Tensor>& ahead,
                                                      at::IntArrayRef sizes, int64_t window, int64_t last) {
    TORCH_CHECK(grad.dim() == 3 && !sizes.empty() && grad.size(2) % int64_t(16 * sizes.size()) == 0,
                "the gradient must be (batch, length, sizes * width), width a multiple of 16; got ", grad.sizes());
    const CheckedWindows windows = check_windows(sizes, window, last);
    const CheckedTokens tokens = check_tokens(grams, runs, std::nullopt, behind, ahead, std::nullopt, grad.size(1));
    const int64_t width = grad.size(2) / int64_t(sizes.size());
    std::vector<Tensor> out;
    std::vector<float*> pointers;
    for (int64_t n : sizes) {
      int64_t rows = 1;
      for (int64_t i = 0; i < n; i++) rows *= 5;
      out.push_back(at::zeros({rows, width}, grad.options().dtype(at::kFloat)));
      pointers.push_back(out.back().mutable_data_ptr<float>());
    }
    const Tensor given_grad = dense(grad);
    const std::vector<int> numbers(sizes.begin(), sizes.end());
    FeatureArguments a = feature_arguments(tokens, windows, numbers, width, type_of(given_grad));
    a.grad_features = given_grad.const_data_ptr();
    a.grad_rows = pointers.data();
    if (given_grad.numel()) Backend::features_backward(a, given_grad);
    return out;
  }

  static void implement(torch::Library& m) {
    m.impl("ngram_plan", ngram_plan);
    m.impl("folded_memory", folded_memory);
    m.impl("folded_memory_backward", folded_memory_backward);
    m.impl("gated_memory", gated_memory);
    m.impl("gated_memory_backward", gated_memory_backward);
    m.impl("window_features", window_features);
    m.impl("window_features_backward", window_features_backward);
  }
};

}  // namespace gengram
