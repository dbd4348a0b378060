// The CUDA kernels: which run, over which grid, in which memory. Compiled by nvcc, or by a C++ compiler as an emulation
// that runs the same thread bodies on the host (tests/motif_memory/ways/test_native.py).
#include "kernels.h"

#include "bodies.h"

namespace gengram {
inline namespace GENGRAM_CAPABILITY {
namespace {

constexpr int64_t kChunk = 65536;               // positions whose sums are kept at a time
constexpr int64_t kMostSharedBytes = 96 << 10;  // of a block

// Carves pieces out of memory; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block, and blocks side by side, for rows of so many columns.
struct Slices {
  int threads;
  int64_t count, parts;
  explicit Slices(int64_t width, int most = kThreadsMost)
      : threads(int(smaller(divided(width, kWarpColumns) * kWarp, most))), count(divided(width, int64_t(threads) * kColumns)),
        parts(divided(width, kWarpColumns)) {}
};

#define GENGRAM_TRY(call) \
  if (const int error = (call)) return error

template <class T>
struct Kind {
  using type = T;
};

template <class F>
int with_type(Type type, F f) {
  if (type == Type::kFloat) return f(Kind<float>{});
  return type == Type::kHalf ? f(Kind<Half>{}) : f(Kind<BFloat16>{});
}

Geometry geometry_of(const Windows& w, const Tables& t) { return make_geometry(w.window, w.largest, w.last, w.sizes, int32_t(t.top_rows)); }

template <class T>
FromRows<T> rows_of(const Windows& w, const Tables& t, int64_t hidden) {
  return {geometry_of(w, t), static_cast<const T*>(t.rows), t.row_stride, t.slab_stride, t.slab_width, hidden, 1.f / t.scale};
}

// Calls f(type of the hidden states, origin). Given keys and values are float32 or of the type of the hidden states.
template <bool kAnyRows, class Arguments, class F>
int with_origin(const Arguments& a, F f) {
  return with_type(a.type, [&](auto kind) -> int {
    using X = typename decltype(kind)::type;
    if (a.source.tables) {
      if constexpr (kAnyRows) {
        if (a.source.tables->type == Type::kHalf) return f(kind, rows_of<Half>(a.windows, *a.source.tables, a.layer.hidden));
        if (a.source.tables->type == Type::kBFloat16) return f(kind, rows_of<BFloat16>(a.windows, *a.source.tables, a.layer.hidden));
      }
      return f(kind, rows_of<float>(a.windows, *a.source.tables, a.layer.hidden));
    }
    if (a.source.type == Type::kFloat)
      return f(kind, FromTensors<float>{static_cast<const float*>(a.source.key), static_cast<const float*>(a.source.value), a.layer.hidden});
    return f(kind, FromTensors<X>{static_cast<const X*>(a.source.key), static_cast<const X*>(a.source.value), a.layer.hidden});
  });
}

// ---- forward

struct ForwardMemory {
  int64_t reach, reach_ahead, chunk, ring_bytes;
  GateSums* sums;
  Four* ring = nullptr;
  int64_t bytes;

  ForwardMemory(const ForwardArguments& a, void* memory) {
    Workspace space(memory);
    const Slices slices(a.layer.hidden);
    reach = a.layer.conv_weight ? (a.layer.taps - 1) * a.layer.dilation : 0;
    reach_ahead = a.layer.conv_weight ? reach - a.layer.reach_back : 0;
    chunk = larger(kChunk / larger(a.tokens.batch, 1), kTile);
    sums = space.take<GateSums>(a.tokens.batch * smaller(a.tokens.length, chunk + reach_ahead) * slices.parts);
    ring_bytes = (reach + kGroup) * slices.threads * int64_t(sizeof(Four));
    if (ring_bytes > kMostSharedBytes - (8 << 10)) {
      const int64_t tiles = divided(smaller(a.tokens.length, chunk), kTile);
      ring = space.take<Four>(ring_bytes / int64_t(sizeof(Four)) * tiles * a.tokens.batch * slices.count);
    }
    bytes = space.used();
  }
};

bool decodes(const ForwardArguments& a) {
  const bool is_causal = !a.layer.conv_weight || a.layer.reach_back == (a.layer.taps - 1) * a.layer.dilation;
  return a.tokens.length == 1 && is_causal && a.layer.hidden <= 1024 * kColumns;
}

template <class X, class Origin>
int decode(const ForwardArguments& a, const Origin& origin, void* stream) {
  const Slices slices(a.layer.hidden, 1024);
  const DecodeKernel<Origin, X> kernel{origin,
                                       a.tokens,
                                       a.layer,
                                       static_cast<const X*>(a.hidden_states),
                                       a.history,
                                       static_cast<X*>(a.residual),
                                       a.gate,
                                       a.gated,
                                       a.kept,
                                       slices.parts};
  return launch(kernel, a.tokens.batch, 1, slices.threads, slices.parts * int64_t(sizeof(GateSums)), stream);
}

template <class X, class Origin>
int gates_of(const Origin& origin, const Tokens& tokens, const Layer& layer, const void* hidden_states, int64_t begin, int64_t end,
             GateSums* sums, float* gates, Gate* details, void* stream) {
  if (end <= begin) return 0;
  const Slices slices(layer.hidden);
  const int64_t tiles = divided(end - begin, kTile);
  const GateSumsKernel<Origin, X> kernel{origin, tokens, static_cast<const X*>(hidden_states), layer.norm_weight, sums, layer.hidden,
                                         begin, end, tiles, slices.parts};
  GENGRAM_TRY(launch(kernel, tokens.batch * tiles, slices.count, slices.threads, Origin::shared_bytes(kTile), stream));
  const GatesKernel last{sums, gates, details, tokens.batch, tokens.length, layer.hidden, begin, end, slices.parts, layer.eps};
  return launch(last, divided(tokens.batch * (end - begin), kThreadsMost), 1, kThreadsMost, 0, stream);
}

template <class X, class Origin>
int forward_from(const ForwardArguments& a, const Origin& origin, void* workspace, void* stream) {
  if (decodes(a)) return decode<X>(a, origin, stream);
  const ForwardMemory memory(a, workspace);
  const Slices slices(a.layer.hidden);
  const int64_t length = a.tokens.length, reach_back = memory.reach - memory.reach_ahead;
  int64_t gated = 0;  // positions whose gates are known
  for (int64_t begin = 0; begin < length; begin += memory.chunk) {
    const int64_t end = smaller(begin + memory.chunk, length), needed = smaller(end + memory.reach_ahead, length);
    GENGRAM_TRY(gates_of<X>(origin, a.tokens, a.layer, a.hidden_states, gated, needed, memory.sums, a.gate, nullptr, stream));
    gated = needed;
    const int64_t tiles = divided(end - begin, kTile);
    using Kernel = ValuesKernel<Origin, X>;
    const int64_t ring_at = Kernel::ring_at(memory.reach);
    const Kernel kernel{origin, a.tokens, a.layer, a.gate, a.history, static_cast<X*>(a.residual), a.gated, a.kept,
                        begin, end, tiles, memory.reach, reach_back, memory.ring, Kernel::strengths_at(memory.reach), ring_at};
    GENGRAM_TRY(launch(kernel, a.tokens.batch * tiles, slices.count, slices.threads, ring_at + (memory.ring ? 0 : memory.ring_bytes), stream));
  }
  return 0;
}

// ---- backward

struct BackwardMemory {
  GateSums* sums;
  float *gates, *values = nullptr, *grad_taps = nullptr, *products, *partial, *grads = nullptr, *pooled = nullptr, *weights = nullptr,
        *heads = nullptr, *tails = nullptr;
  Gate* details;
  GateGradient* factors;
  int64_t entries = 0, bytes;

  BackwardMemory(const BackwardArguments& a, void* memory) {
    Workspace space(memory);
    const Slices slices(a.layer.hidden);
    const int64_t positions = a.tokens.batch * a.tokens.length, numbers = positions * a.layer.hidden;
    const int64_t tiles = a.tokens.batch * divided(a.tokens.length, kTile), chunk = larger(kChunk / larger(a.tokens.batch, 1), kTile);
    sums = space.take<GateSums>(a.tokens.batch * smaller(a.tokens.length, chunk) * slices.parts);
    gates = space.take<float>(positions);
    details = space.take<Gate>(positions);
    factors = space.take<GateGradient>(positions);
    products = space.take<float>(positions * slices.parts);
    partial = space.take<float>(tiles * larger(a.layer.conv_weight ? a.layer.taps : 1, 1) * a.layer.hidden);
    if (a.layer.conv_weight) grad_taps = space.take<float>(numbers);
    if (a.source.tables) {
      const int64_t all = a.tokens.batch * a.tokens.tokens;
      entries = (a.windows.largest + 1) * all;
      values = space.take<float>(numbers);
      grads = space.take<float>(numbers);
      pooled = space.take<float>(all * a.layer.hidden);
      weights = space.take<float>(positions * (kLargestSize + 2));
      heads = space.take<float>(divided(entries, kPiece) * a.layer.hidden);
      tails = space.take<float>(divided(entries, kPiece) * a.layer.hidden);
    }
    bytes = space.used();
  }
};

// Gradients of the taps and of the values, and the factors of the gradients of query and key.
template <class V, class X>
int value_gradients(const BackwardArguments& a, const BackwardMemory& memory, const V* values, float* grad_values, void* stream) {
  const Slices slices(a.layer.hidden);
  const int64_t tiles = divided(a.tokens.length, kTile), blocks = a.tokens.batch * tiles, positions = a.tokens.batch * a.tokens.length;
  const GatedTile<V, X> tile{a.tokens, a.layer, values, static_cast<const X*>(a.grad_residual), memory.gates, memory.grad_taps, tiles};
  if (a.layer.conv_weight) {
    const TapGradientsKernel<V, X> taps{tile};
    GENGRAM_TRY(launch(taps, blocks, slices.count, slices.threads, 0, stream));
    const ConvGradientsKernel<V, X> conv{tile, memory.partial};
    GENGRAM_TRY(launch(conv, blocks, slices.count, slices.threads, 0, stream));
    const int64_t count = a.layer.taps * a.layer.hidden;
    const SumTilesKernel sum{memory.partial, a.grad_conv, blocks, count};
    GENGRAM_TRY(launch(sum, divided(count, kThreadsMost), 1, kThreadsMost, 0, stream));
  }
  const ValueGradientsKernel<V, X> kernel{tile, grad_values, memory.products, slices.parts};
  GENGRAM_TRY(launch(kernel, blocks, slices.count, slices.threads, 0, stream));
  const GateGradientsKernel gate{memory.products, memory.details, a.grad_gate, a.tokens.exists, memory.factors, positions, slices.parts, a.layer.hidden};
  return launch(gate, divided(positions, kThreadsMost), 1, kThreadsMost, 0, stream);
}

template <class Entries>
int scatter(const Entries& entries, const int32_t* keys, const int64_t* order, int64_t count, float* heads, float* tails, void* stream) {
  const Slices slices(entries.width);
  const ScatterKernel<Entries> kernel{entries, keys, order, count, heads, tails};
  GENGRAM_TRY(launch(kernel, divided(count, kPiece), slices.count, slices.threads, 0, stream));
  const JoinKernel<Entries> join{entries, keys, count, heads, tails};
  return launch(join, divided(count, kPiece), slices.count, slices.threads, 0, stream);
}

// Adds the gradients of keys (side 0) or values (1), which are in memory.grads, to the rows.
int row_gradients(const BackwardArguments& a, const BackwardMemory& memory, int side, const int32_t* keys, const int64_t* order, void* stream) {
  const Geometry g = geometry_of(a.windows, *a.source.tables);
  const int64_t hidden = a.layer.hidden, tiles = divided(a.tokens.tokens, kTile);
  const float scale = 1.f / a.source.tables->scale;
  const Slices slices(hidden);
  const PoolKernel<float> pool{g, a.tokens, memory.weights, memory.grads, memory.pooled, hidden, hidden, tiles, g.largest, scale};
  GENGRAM_TRY(launch(pool, a.tokens.batch * tiles, slices.count, slices.threads, pool.shared_bytes(g, g.largest), stream));
  const RowEntries entries{g, a.tokens, memory.weights, memory.grads, memory.pooled, a.grad_rows, hidden, a.source.tables->slab_width, side, scale};
  return scatter(entries, keys, order, memory.entries, memory.heads, memory.tails, stream);
}

template <class X, class Origin>
int backward_from(const BackwardArguments& a, const Origin& origin, const int32_t* keys, const int64_t* order, void* workspace, void* stream) {
  const BackwardMemory memory(a, workspace);
  const Slices slices(a.layer.hidden);
  const int64_t length = a.tokens.length, tiles = divided(length, kTile), blocks = a.tokens.batch * tiles;
  const int64_t chunk = larger(kChunk / larger(a.tokens.batch, 1), kTile);
  for (int64_t begin = 0; begin < length; begin += chunk)
    GENGRAM_TRY(gates_of<X>(origin, a.tokens, a.layer, a.hidden_states, begin, smaller(begin + chunk, length), memory.sums, memory.gates,
                            memory.details, stream));
  if constexpr (Origin::kHasRows) {
    const WeightsKernel weights{origin.g, a.tokens, memory.weights};
    GENGRAM_TRY(launch(weights, divided(a.tokens.batch * length, kThreadsMost), 1, kThreadsMost, 0, stream));
    const ValueRowsKernel<Origin> values{origin, a.tokens, memory.values, a.layer.hidden, tiles};
    GENGRAM_TRY(launch(values, blocks, slices.count, slices.threads, Origin::shared_bytes(kTile), stream));
    GENGRAM_TRY((value_gradients<float, X>(a, memory, memory.values, memory.grads, stream)));
    GENGRAM_TRY(row_gradients(a, memory, 1, keys, order, stream));
  } else {
    GENGRAM_TRY((value_gradients<typename std::remove_const<typename std::remove_pointer<decltype(origin.value)>::type>::type, X>(
        a, memory, origin.value, a.grad_value, stream)));
  }
  float* grad_keys = Origin::kHasRows ? memory.grads : a.grad_key;
  const KeyGradientsKernel<Origin, X> kernel{origin, a.tokens, static_cast<const X*>(a.hidden_states), a.layer.norm_weight, memory.factors,
                                             static_cast<X*>(a.grad_hidden), grad_keys, memory.partial, a.layer.hidden, tiles};
  GENGRAM_TRY(launch(kernel, blocks, slices.count, slices.threads, Origin::shared_bytes(kTile), stream));
  const SumTilesKernel sum{memory.partial, a.grad_norm, blocks, a.layer.hidden};
  GENGRAM_TRY(launch(sum, divided(a.layer.hidden, kThreadsMost), 1, kThreadsMost, 0, stream));
  if constexpr (Origin::kHasRows) return row_gradients(a, memory, 0, keys, order, stream);
  return 0;
}

// ---- window means

Geometry geometry_of(const FeatureArguments& a) { return make_geometry(a.windows.window, a.windows.largest, a.windows.last, a.windows.sizes, 0); }

struct FeatureMemory {
  float *weights, *pooled, *heads, *tails;
  int64_t bytes;

  FeatureMemory(const FeatureArguments& a, void* memory) {
    Workspace space(memory);
    const int64_t all = a.tokens.batch * a.tokens.tokens;
    weights = space.take<float>(a.tokens.batch * a.tokens.length * (kLargestSize + 2));
    pooled = space.take<float>(all * a.width);
    heads = space.take<float>(divided(all, kPiece) * a.width);
    tails = space.take<float>(divided(all, kPiece) * a.width);
    bytes = space.used();
  }
};

}  // namespace
}  // namespace GENGRAM_CAPABILITY
}  // namespace gengram

using namespace gengram;

int64_t gengram_cuda_plan_bytes(int64_t batch, int64_t tokens) {
  return batch * divided(tokens, kThreadsMost * kPlanTokens) * int64_t(sizeof(int64_t));
}

int gengram_cuda_plan(const int64_t* codes, const int32_t* behind, int64_t batch, int64_t tokens, int largest, int32_t* grams, int32_t* runs,
                      void* workspace, void* stream) {
  const int64_t pieces = divided(tokens, kThreadsMost * kPlanTokens), shared = kThreadsMost * int64_t(sizeof(int64_t));
  int64_t* breaks = static_cast<int64_t*>(workspace);
  GENGRAM_TRY(launch(BreaksKernel{codes, breaks, tokens, pieces}, batch * pieces, 1, kThreadsMost, shared, stream));
  GENGRAM_TRY(launch(CarryBreaksKernel{breaks, batch, pieces}, divided(batch, kThreadsMost), 1, kThreadsMost, 0, stream));
  const PlanKernel kernel{codes, behind, breaks, grams, runs, tokens, pieces, largest};
  return launch(kernel, batch * pieces, 1, kThreadsMost, shared, stream);
}

int64_t gengram_cuda_forward_bytes(const ForwardArguments* a) { return decodes(*a) ? 0 : ForwardMemory(*a, nullptr).bytes; }

int gengram_cuda_forward(const ForwardArguments* a, void* workspace, void* stream) {
  return with_origin<true>(*a, [&](auto kind, const auto& origin) {
    return forward_from<typename decltype(kind)::type>(*a, origin, workspace, stream);
  });
}

int64_t gengram_cuda_row_entries(const BackwardArguments* a) { return BackwardMemory(*a, nullptr).entries; }

int gengram_cuda_row_keys(const BackwardArguments* a, int32_t* keys, void* stream) {
  const RowKeysKernel kernel{geometry_of(a->windows, *a->source.tables), a->tokens, keys};
  return launch(kernel, divided(gengram_cuda_row_entries(a), kThreadsMost), 1, kThreadsMost, 0, stream);
}

int64_t gengram_cuda_backward_bytes(const BackwardArguments* a) { return BackwardMemory(*a, nullptr).bytes; }

int gengram_cuda_backward(const BackwardArguments* a, const int32_t* sorted_keys, const int64_t* order, void* workspace, void* stream) {
  return with_origin<false>(*a, [&](auto kind, const auto& origin) {
    return backward_from<typename decltype(kind)::type>(*a, origin, sorted_keys, order, workspace, stream);
  });
}

int gengram_cuda_features(const FeatureArguments* a, void* stream) {
  return with_type(a->type, [&](auto kind) -> int {
    using T = typename decltype(kind)::type;
    const Slices slices(a->width);
    FeaturesKernel<T> kernel{geometry_of(*a), a->tokens, {}, {}, static_cast<T*>(a->features), a->width, a->tables * a->width,
                             divided(a->tokens.length, kTile), slices.count};
    for (int64_t first = 0; first < a->tables; first += kLargestSize) {
      const int64_t count = smaller(kLargestSize, a->tables - first);
      for (int64_t i = 0; i < count; i++) {
        kernel.tables[i] = static_cast<const T*>(a->rows[first + i]);
        kernel.sizes[i] = a->sizes[first + i];
      }
      kernel.features = static_cast<T*>(a->features) + first * a->width;
      GENGRAM_TRY(launch(kernel, a->tokens.batch * kernel.tiles, count * slices.count, slices.threads, 0, stream));
    }
    return 0;
  });
}

int gengram_cuda_table_keys(const FeatureArguments* a, int64_t table, int32_t* keys, void* stream) {
  const int size = a->sizes[table];
  const TableKeysKernel kernel{a->tokens, keys, size, geometry_of(*a).power[size]};
  return launch(kernel, divided(a->tokens.batch * a->tokens.tokens, kThreadsMost), 1, kThreadsMost, 0, stream);
}

int64_t gengram_cuda_features_backward_bytes(const FeatureArguments* a) { return FeatureMemory(*a, nullptr).bytes; }

int gengram_cuda_features_backward(const FeatureArguments* a, int64_t table, const int32_t* sorted_keys, const int64_t* order, void* workspace,
                                   void* stream) {
  return with_type(a->type, [&](auto kind) -> int {
    using T = typename decltype(kind)::type;
    const FeatureMemory memory(*a, workspace);
    const Geometry g = geometry_of(*a);
    const int size = a->sizes[table];
    const int64_t tiles = divided(a->tokens.tokens, kTile);
    const Slices slices(a->width);
    const WeightsKernel weights{g, a->tokens, memory.weights};
    GENGRAM_TRY(launch(weights, divided(a->tokens.batch * a->tokens.length, kThreadsMost), 1, kThreadsMost, 0, stream));
    const PoolKernel<T> pool{g, a->tokens, memory.weights, static_cast<const T*>(a->grad_features) + table * a->width, memory.pooled, a->width,
                             a->tables * a->width, tiles, size, 1.f / float(g.window - size + 1)};
    GENGRAM_TRY(launch(pool, a->tokens.batch * tiles, slices.count, slices.threads, pool.shared_bytes(g, size), stream));
    const TableEntries entries{memory.pooled, a->grad_rows[table], a->width, g.power[size]};
    return scatter(entries, sorted_keys, order, a->tokens.batch * a->tokens.tokens, memory.heads, memory.tails, stream);
  });
}
