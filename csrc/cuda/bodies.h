// The memory's CUDA kernels, as thread bodies for grid.h. A thread owns four columns and goes over the positions of a
// tile; a warp's 128 columns lie side by side. Every sum is formed in an order that depends on the shapes alone.
//
// Forward: GateSums gives three sums per position and warp, Gates the gates, Values the result; Decode does all three for
// a single token. Backward: the same sums, then one kernel per factor of the chain rule; gradients of table rows are
// gathered per row from sorted lists, so that nothing needs atomics.
#pragma once

#include "grid.h"

namespace gengram {
inline namespace GENGRAM_CAPABILITY {

constexpr int kTile = 128;      // positions of a block
constexpr int kThreadsMost = 128;
constexpr int kWarpColumns = kWarp * kColumns;
constexpr int kGroup = 8;       // positions whose loads are in flight together
constexpr int kEndings = 16;    // of the windows that are swept: a running tree of sums in registers
constexpr int kPiece = 32;      // sorted entries of a block
constexpr int kTapsAtOnce = 4;

constexpr int32_t kSlow = -1;      // in place of a row of B: this position goes its own way
constexpr int32_t kNoOldest = -2;  // a full window of single letters, which has no row in B

// The columns of a thread.
struct Columns {
  int first;  // 0 where the thread has none
  bool active;
  int part;   // of the warp; -1 if it has no column
};

template <class Thread>
GENGRAM_THREAD Columns columns_of(const Thread& thread, int64_t width) {
  const int first = (int(thread.y) * thread.threads + thread.index) * kColumns;
  const int warp = (int(thread.y) * thread.threads + thread.index / kWarp * kWarp) * kColumns;
  return {first < width ? first : 0, first < width, warp < width ? warp / kWarpColumns : -1};
}

GENGRAM_THREAD float strength_of(const Sequence& s, const float* gates, int64_t t) {
  return s.exists && !s.exists[t] ? 0.f : gates[t];
}

GENGRAM_THREAD float sigmoid_of(float x) { return reciprocal(1.f + expf(-x)); }

// ---- keys and values: sums of table rows over windows, or given

// Columns of packed rows.
template <class T>
struct RowColumns {
  const Geometry* g;
  const T* rows;  // the thread's first column of row 0
  int64_t row_stride;
  float factor;

  GENGRAM_THREAD Four row(int64_t index) const { return load(rows + index * row_stride); }

  // Sum of `kWidth` rows up to token j, in the order of push_row.
  template <int kWidth>
  GENGRAM_THREAD Four tree(const Sequence& s, int64_t j) const {
    if constexpr (kWidth == 1)
      return row(s.top[j]);
    else
      return tree<kWidth / 2>(s, j) + tree<kWidth / 2>(s, j - kWidth / 2);
  }

  // The same for any power of two.
  GENGRAM_THREAD Four tree_of(const Sequence& s, int64_t j, int width) const {
    Four level[21];
    GENGRAM_KEEP_LOOP for (int i = width - 1; i >= 0; i--) {  // the oldest first
      Four sum = row(s.top[j - i]);
      const int done = width - i;
      int depth = 0;
      GENGRAM_KEEP_LOOP for (; (done >> depth & 1) == 0; depth++) sum = sum + level[depth];
      level[depth] = sum;
      if (i == 0) return sum;
    }
    return filled(0.f);
  }

  // A window that is full of letters, on its own.
  GENGRAM_THREAD Four full_window(const Sequence& s, int64_t t) const {
    const int64_t end = window_end(*g, s, t);
    Four out = filled(0.f);
    if (g->endings == kEndings) {
      out = tree<kEndings>(s, end);
    } else {
      int taken = 0;
      GENGRAM_KEEP_LOOP for (int width = 1; width <= g->endings; width *= 2) {
        if (!(g->endings & width)) continue;
        const Four part = tree_of(s, end - taken, width);
        out = taken ? out + part : part;
        taken += width;
      }
    }
    if (g->largest > 1) out = out + row(oldest_row(*g, s, t));
    return out * factor;
  }
};

// Windows that are not full of letters, one position after the other. A window that begins where the last one began only
// adds its new tokens, as behind the start of a sequence. A sum's order is that of a window on its own. `kRowsAtOnce`
// rows of a token are on their way together.
template <class T, int kRowsAtOnce>
struct GrowingWindow {
  const RowColumns<T>& columns;
  // By size m: rows of C_m where a longer n-gram ends, rows of C_m where none does, and how many these are.
  Four longer[kLargestSize], longest[kLargestSize];
  int count[kLargestSize];
  int64_t begin = 0, stop = -1;  // tokens that these hold, if stop >= 0

  GENGRAM_THREAD explicit GrowingWindow(const RowColumns<T>& all) : columns(all) {}

  GENGRAM_THREAD void restart(int64_t token) {
    GENGRAM_KEEP_LOOP for (int i = 0; i < kLargestSize; i++) {
      longer[i] = longest[i] = filled(0.f);
      count[i] = 0;
    }
    begin = stop = token;
  }

  // Whether the tokens between the two beginnings are no letters, so that the sums need none of them.
  GENGRAM_THREAD bool holds(const Sequence& s, const Span& span) const {
    if (span.begin < begin || span.begin > stop || span.stop < stop) return false;
    GENGRAM_KEEP_LOOP for (int64_t j = begin; j < span.begin; j++)
      if (s.runs[j] > 0) return false;
    return true;
  }

  GENGRAM_THREAD void push(const Sequence& s, const Span& span, int64_t j) {
    const Geometry& g = *columns.g;
    const int size = longest_in_span(g, s, span, j), gram = s.grams[j], top = s.top[j];
    GENGRAM_KEEP_LOOP for (int first = 0; first < kLargestSize; first += kRowsAtOnce) {
      int32_t ids[kRowsAtOnce];  // any row where no n-gram of this size ends
      Four rows[kRowsAtOnce];
      GENGRAM_UNROLL for (int i = 0; i < kRowsAtOnce; i++) {
        const int m = first + i + 1;
        const int32_t shorter = g.section[m] + gram % power_of_five(m);
        ids[i] = m < g.largest && m <= size ? shorter : top;
      }
      GENGRAM_UNROLL for (int i = 0; i < kRowsAtOnce; i++) rows[i] = columns.row(ids[i]);
      GENGRAM_UNROLL for (int i = 0; i < kRowsAtOnce; i++) {
        const int m = first + i + 1;
        if (m < size) longer[m - 1] = longer[m - 1] + rows[i];
        if (m == size) longest[m - 1] = longest[m - 1] + rows[i], count[m - 1]++;
      }
    }
  }

  GENGRAM_THREAD Four at(const Sequence& s, int64_t t) {
    const Geometry& g = *columns.g;
    const Span span = window_span(g, s, t);
    if (!holds(s, span)) restart(span.begin);
    begin = span.begin;
    GENGRAM_KEEP_LOOP for (int64_t j = stop; j < span.stop; j++) push(s, span, j);
    stop = span.stop;
    Four out = filled(0.f);
    float above = 0.f;  // weight of the next larger size
    int ngrams = 0;
    GENGRAM_KEEP_LOOP for (int m = g.largest; m > 0; m--) {
      ngrams += count[m - 1];
      const float weight = irregular_weight(g, m, ngrams);
      if (weight != above) out = add_product(out, longer[m - 1], weight - above);
      if (weight != 0.f) out = add_product(out, longest[m - 1], weight);
      above = weight;
    }
    return out * columns.factor;
  }
};

template <class T>
struct FromRows {
  static constexpr bool kHasRows = true;
  static constexpr int kBlocks = 2;  // of ValuesKernel: with more, its registers spill
  Geometry g;
  const T* rows;
  int64_t row_stride, slab_stride, slab_width, hidden;
  float factor;

  // Bytes of shared memory for the rows of `count` positions.
  static int64_t shared_bytes(int64_t count) { return (2 * (count + kGroup) + kEndings) * int64_t(sizeof(int32_t)); }

  // Notes which rows the positions first .. first + count - 1 read: of A, from kEndings tokens earlier on, and of B.
  template <class Thread>
  GENGRAM_THREAD void prepare(const Thread& thread, const Sequence& s, int64_t first, int count) const {
    int32_t* newest = reinterpret_cast<int32_t*>(thread.shared);
    int32_t* oldest = newest + count + kGroup + kEndings;
    for (int i = thread.index; i < count + kGroup + kEndings; i += thread.threads) {
      const int64_t j = s.context + first + g.last + i - kEndings;
      newest[i] = j >= 0 && j < s.tokens ? s.top[j] : 0;
    }
    for (int i = thread.index; i < count + kGroup; i += thread.threads) {
      const int64_t t = first + i;
      const bool swept = g.endings == kEndings && i < count && t >= 0 && t < s.length && is_regular(g, s, t);
      oldest[i] = !swept ? kSlow : g.largest > 1 ? oldest_row(g, s, t) : kNoOldest;
    }
  }

  // Gives the sums of keys (side 0) or values (1) of positions first .. first + count - 1 to `sink`, eight at once where
  // the windows are full of letters, else one by one.
  template <class Thread, class Sink>
  GENGRAM_THREAD void sweep(const Thread& thread, const Sequence& s, int64_t, int side, int64_t column, int64_t first, int count,
                          Sink& sink) const {
    const int32_t* newest = reinterpret_cast<const int32_t*>(thread.shared);
    const int32_t* oldest = newest + count + kGroup + kEndings;
    const RowColumns<T> columns = of(side, column);
    Four ring[2 * kEndings - 1];
    GENGRAM_UNROLL for (int i = 0; i < 2 * kEndings - 1; i++) ring[i] = filled(0.f);
    bool is_warm = false;
    for (int i = 0; i < count;) {
      if (!is_swept(oldest + i)) {
        GrowingWindow<T, kLargestSize> growing(columns);
        GENGRAM_KEEP_LOOP do {
          const int64_t t = first + i;
          sink.one(t, t < 0 || t >= s.length ? filled(0.f) : is_regular(g, s, t) ? columns.full_window(s, t) : growing.at(s, t));
          i++;
        } while (i < count && (i % kGroup || !is_swept(oldest + i)));
        GENGRAM_UNROLL for (int p = 0; p < 2 * kEndings - 1; p++) ring[p] = filled(0.f);  // frees its registers meanwhile
        is_warm = false;
        continue;
      }
      Four sums[kGroup];
      GENGRAM_KEEP_LOOP for (int lead = is_warm ? 2 : 0; lead < 3; lead++) {  // two groups of rows fill the ring
        const int32_t* ids = newest + i + kGroup * lead;
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++)
          sums[p] = push_row<kEndings>(columns.row(ids[p]), ring, 1, kEndings, p);
      }
      is_warm = true;
      GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
        if (oldest[i + p] != kNoOldest) sums[p] = sums[p] + columns.row(oldest[i + p]);
        sums[p] = sums[p] * factor;
      }
      sink.eight(first + i, sums);
      i += kGroup;
    }
  }

  // Whether the windows of a group are all full of letters.
  GENGRAM_THREAD static bool is_swept(const int32_t* oldest) {
    bool all = true;
    GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) all = all && oldest[p] != kSlow;
    return all;
  }

  GENGRAM_THREAD Four window(const Sequence& s, int64_t, int side, int64_t column, int64_t t) const {
    constexpr int kRowsAtOnce = 2;  // with more, the registers of Decode spill
    const RowColumns<T> columns = of(side, column);
    return is_regular(g, s, t) ? columns.full_window(s, t) : GrowingWindow<T, kRowsAtOnce>(columns).at(s, t);
  }

  GENGRAM_THREAD RowColumns<T> of(int side, int64_t column) const {
    const int64_t at = side * hidden + column;
    return {&g, rows + at / slab_width * slab_stride + at % slab_width, row_stride, factor};
  }
};

template <class T>
struct FromTensors {
  static constexpr bool kHasRows = false;
  static constexpr int kBlocks = sizeof(T) > 2 ? 3 : 4;
  const T *key, *value;  // (batch, length, hidden)
  int64_t hidden;

  static int64_t shared_bytes(int64_t) { return 0; }

  template <class Thread>
  GENGRAM_THREAD void prepare(const Thread&, const Sequence&, int64_t, int) const {}

  template <class Thread, class Sink>
  GENGRAM_THREAD void sweep(const Thread&, const Sequence& s, int64_t row, int side, int64_t column, int64_t first, int count,
                          Sink& sink) const {
    GENGRAM_KEEP_LOOP for (int i = 0; i < count; i += kGroup) {
      if (i + kGroup <= count && first + i >= 0 && first + i + kGroup <= s.length) {
        Four loaded[kGroup];
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) loaded[p] = window(s, row, side, column, first + i + p);
        sink.eight(first + i, loaded);
      } else {
        GENGRAM_KEEP_LOOP for (int p = i; p < i + kGroup && p < count; p++) {
          const int64_t t = first + p;
          sink.one(t, t >= 0 && t < s.length ? window(s, row, side, column, t) : filled(0.f));
        }
      }
    }
  }

  GENGRAM_THREAD Four window(const Sequence& s, int64_t row, int side, int64_t column, int64_t t) const {
    return load_once((side ? value : key) + (row * s.length + t) * hidden + column);
  }
};

// ---- forward

// Sums for the gates of positions begin .. end - 1: (batch, end - begin, parts).
template <class Origin, class X>
struct GateSumsKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 2, kPhases = 2;
  Origin origin;
  Tokens tokens;
  const X* hidden_states;
  const float* norm_weight;
  GateSums* sums;
  int64_t hidden, begin, end, tiles, parts;

  template <class Thread>
  struct Sink {
    const Thread& thread;
    const X* query;
    Four weight;
    float* out;  // of position `begin`
    int64_t hidden, begin, stride;
    float active;

    GENGRAM_THREAD float* at(int64_t t) const { return out ? out + (t - begin) * stride : nullptr; }
    GENGRAM_THREAD void one(int64_t t, const Four& key) const {
      const Four q = load_once(query + t * hidden);
      thread.sum(dot(key, key) * active, at(t));
      thread.sum(dot(q * weight, key) * active, out ? at(t) + 1 : nullptr);
      thread.sum(dot(q, q) * active, out ? at(t) + 2 : nullptr);
    }
    GENGRAM_THREAD void eight(int64_t t, const Four (&keys)[kGroup]) const {
      float a[kGroup], b[kGroup], c[kGroup];
      GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
        const Four q = load_once(query + (t + p) * hidden);
        a[p] = dot(keys[p], keys[p]) * active;
        b[p] = dot(q * weight, keys[p]) * active;
        c[p] = dot(q, q) * active;
      }
      thread.sum_eight(a, at(t), stride);
      thread.sum_eight(b, out ? at(t) + 1 : nullptr, stride);
      thread.sum_eight(c, out ? at(t) + 2 : nullptr, stride);
    }
  };

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x / tiles, first = begin + thread.x % tiles * kTile;
    const int count = int(smaller(kTile, end - first));
    const Sequence s = sequence_of(tokens, row);
    if constexpr (kPhase == 0) {
      origin.prepare(thread, s, first, count);
    } else {
      const Columns columns = columns_of(thread, hidden);
      float* out = columns.part < 0 ? nullptr : &sums[row * (end - begin) * parts + columns.part].key_square;
      Sink<Thread> sink{thread, hidden_states + row * s.length * hidden + columns.first, load(norm_weight + columns.first), out,
                        hidden, begin, 3 * parts, columns.active ? 1.f : 0.f};
      origin.sweep(thread, s, row, 0, columns.first, first, count, sink);
    }
  }
};

GENGRAM_THREAD Gate gate_of_parts(const GateSums* sums, int64_t parts, int64_t hidden, float eps) {
  GateSums total = sums[0];
  for (int64_t i = 1; i < parts; i++) {
    total.key_square += sums[i].key_square;
    total.product += sums[i].product;
    total.query_square += sums[i].query_square;
  }
  return make_gate(total, hidden, eps);
}

// One thread per position.
struct GatesKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  const GateSums* sums;
  float* gates;  // (batch, length)
  Gate* details;  // (batch, length) or null
  int64_t batch, length, hidden, begin, end, parts;
  float eps;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t i = thread.x * thread.threads + thread.index, count = end - begin;
    if (i >= batch * count) return;
    const Gate gate = gate_of_parts(sums + i * parts, parts, hidden, eps);
    const int64_t place = i / count * length + begin + i % count;
    gates[place] = gate.gate;
    if (details) details[place] = gate;
  }
};

// u + SiLU(convolution of u) for positions begin .. end - 1, u = gate * value.
template <class Origin, class X>
struct ValuesKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = Origin::kBlocks, kPhases = 2;
  static constexpr unsigned char kPlainInputs = 1, kPlainOutputs = 2;
  Origin origin;
  Tokens tokens;
  Layer layer;
  const float *gates, *history;
  X* residual;
  float* kept;
  int64_t kept_count, begin, end, tiles, reach, reach_back;
  Four* ring;  // in global memory, if shared memory cannot hold it

  GENGRAM_THREAD int slots() const { return int(reach) + kGroup; }

  // Shared memory: what the origin takes, then the strengths, what is plain, and the ring.
  static int64_t strengths_at(int64_t reach) { return (Origin::shared_bytes(kTile + reach) + 15) / 16 * 16; }
  static int64_t ring_at(int64_t reach) {
    const int64_t count = kTile + reach + kGroup;
    return strengths_at(reach) + (count * int64_t(sizeof(float)) + count / kGroup + 16) / 16 * 16;
  }
  int64_t strengths_offset, ring_offset;

  // The inputs of a tile's positions, counted from its first one, and its results.
  struct Sink {
    const ValuesKernel& k;
    const Sequence& s;
    Four *ring, *fast_ring;  // the same in plain groups, where the compiler knows that it is in shared memory
    int stride, slot;        // of the newest input
    int64_t row, column, base, first, last;  // base: the first input's position; results at first .. last - 1
    const float* strengths;
    const unsigned char* plain;  // of groups: whether no input and no result is a special case
    Four taps[kTapsAtOnce];
    bool active;

    GENGRAM_THREAD int ahead() const { return int(k.reach - k.reach_back); }
    GENGRAM_THREAD int next(int at) const { return at + 1 == k.slots() ? 0 : at + 1; }
    GENGRAM_THREAD int before(int back) const {  // `back` positions before the newest
      const int at = slot - back;
      return at < 0 ? at + k.slots() : at;
    }
    GENGRAM_THREAD Four silu(const Four& sum) const {
      Four out;
      GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] = sum.x[i] * sigmoid_of(sum.x[i]);
      return out;
    }

    GENGRAM_THREAD void put(int64_t t, const Four& value) {
      Four input = filled(0.f);
      if (t >= 0 && t < s.length) {
        input = value * strengths[t - base];
        if (active && t >= s.length - k.kept_count && t >= first && t < last)
          store(k.kept + (row * k.kept_count + t - (s.length - k.kept_count)) * k.layer.hidden + column, input);
      } else if (t < 0 && k.history) {
        input = load(k.history + (row * k.reach_back + k.reach_back + t) * k.layer.hidden + column);
      }
      slot = next(slot);
      store(ring[slot * stride].x, input);
    }
    // The result at position t; the newest input is that of `newest`.
    GENGRAM_THREAD void emit(int64_t t, int64_t newest) const {
      if (t < first || t >= last) return;
      Four out = load_written(ring[before(int(newest - t)) * stride].x);
      if (k.layer.conv_weight) {
        Four sum = filled(0.f);
        GENGRAM_UNROLL for (int tap = 0; tap < kTapsAtOnce; tap++) {
          const int64_t offset = tap * k.layer.dilation - k.reach_back;
          if (tap < k.layer.taps && is_in_segment(s, t, offset))
            sum = add_product(sum, load_written(ring[before(int(newest - t - offset)) * stride].x), taps[tap]);
        }
        GENGRAM_KEEP_LOOP for (int64_t tap = kTapsAtOnce; tap < k.layer.taps; tap++) {
          const int64_t offset = tap * k.layer.dilation - k.reach_back;
          if (is_in_segment(s, t, offset))
            sum = add_product(sum, load_written(ring[before(int(newest - t - offset)) * stride].x),
                              load(k.layer.conv_weight + tap * k.layer.hidden + column));
        }
        out = out + silu(sum);
      }
      if (active) store_once(k.residual + (row * s.length + t) * k.layer.hidden + column, out);
    }
    GENGRAM_THREAD void one(int64_t t, const Four& value) {
      put(t, value);
      emit(t - ahead(), t);
    }
    GENGRAM_THREAD void eight(int64_t t, const Four (&values)[kGroup]) {
      const unsigned char kind = plain[(t - base) / kGroup];
      Four inputs[kGroup];
      if (kind & kPlainInputs) {
        const float* strength = strengths + (t - base);
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
          inputs[p] = values[p] * strength[p];
          slot = next(slot);
          store(fast_ring[slot * stride].x, inputs[p]);
        }
      } else {
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) put(t + p, values[p]);
      }
      if ((kind & kPlainInputs) && (kind & kPlainOutputs)) {
        int places[kTapsAtOnce], own = before(kGroup - 1 + ahead());
        GENGRAM_UNROLL for (int tap = 0; tap < kTapsAtOnce; tap++)
          places[tap] = before(kGroup - 1 + ahead() - (tap * int(k.layer.dilation) - int(k.reach_back)));
        X* out = k.residual + (row * s.length + t - ahead()) * k.layer.hidden + column;
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
          const Four input = ahead() ? load_written(fast_ring[own * stride].x) : inputs[p];
          Four sum = filled(0.f);
          GENGRAM_UNROLL for (int tap = 0; tap < kTapsAtOnce; tap++) {
            const bool is_own = tap == kTapsAtOnce - 1 && !ahead();
            sum = add_product(sum, is_own ? input : load_written(fast_ring[places[tap] * stride].x), taps[tap]);
            places[tap] = next(places[tap]);
          }
          own = next(own);
          if (active) store_once(out + p * k.layer.hidden, input + silu(sum));
        }
      } else {
        GENGRAM_KEEP_LOOP for (int p = 0; p < kGroup; p++) emit(t + p - ahead(), t + kGroup - 1);
      }
    }
  };

  // Whether the group of inputs from position t on, and the results that they complete, have no special case.
  GENGRAM_THREAD unsigned char plain_of(const Sequence& s, int64_t t, int64_t from, int64_t to) const {
    if (ring) return 0;
    unsigned char kind = t >= 0 && t + kGroup <= s.length - kept_count ? kPlainInputs : 0;
    const int64_t ahead = reach - reach_back, first = t - ahead;
    bool is_plain = layer.taps == kTapsAtOnce && layer.conv_weight && first >= from && first + kGroup <= to;
    for (int64_t i = first; is_plain && i < first + kGroup; i++)
      is_plain = is_in_segment(s, i, -reach_back) && is_in_segment(s, i, ahead);
    return is_plain ? kind | kPlainOutputs : kind;
  }

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x / tiles, from = begin + thread.x % tiles * kTile, to = smaller(from + kTile, end);
    const int64_t first = from - reach_back;
    const int count = int(to - from + reach);
    const Sequence s = sequence_of(tokens, row);
    float* strengths = reinterpret_cast<float*>(thread.shared + strengths_offset);
    unsigned char* plain = reinterpret_cast<unsigned char*>(strengths + count);
    if constexpr (kPhase == 0) {
      origin.prepare(thread, s, first, count);
      for (int i = thread.index; i < count; i += thread.threads) {
        const int64_t t = first + i;
        strengths[i] = t >= 0 && t < s.length ? strength_of(s, gates + row * s.length, t) : 0.f;
        if (i % kGroup == 0) plain[i / kGroup] = plain_of(s, t, from, to);
      }
    } else {
      const Columns columns = columns_of(thread, layer.hidden);
      Four* shared_ring = reinterpret_cast<Four*>(thread.shared + ring_offset) + thread.index;
      Four* own_ring = ring ? ring + (thread.y * (tokens.batch * tiles) + thread.x) * slots() * thread.threads + thread.index : shared_ring;
      Sink sink{*this, s, own_ring, shared_ring, thread.threads, -1, row, columns.first, first, from, to, strengths, plain, {}, columns.active};
      GENGRAM_UNROLL for (int tap = 0; tap < kTapsAtOnce; tap++)
        sink.taps[tap] = tap < layer.taps && layer.conv_weight ? load(layer.conv_weight + tap * layer.hidden + columns.first) : filled(0.f);
      origin.sweep(thread, s, row, 1, columns.first, first, count, sink);
    }
  }
};

// A single causal token: one block per sequence does the work of the three kernels above, with the same additions.
template <class Origin, class X>
struct DecodeKernel {
  static constexpr int kThreads = 1024, kBlocks = 1, kPhases = 2;
  Origin origin;
  Tokens tokens;
  Layer layer;
  const X* hidden_states;
  const float* history;
  X* residual;
  float *gates, *kept;
  int64_t kept_count, parts;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x, hidden = layer.hidden;
    const Sequence s = sequence_of(tokens, row);
    const Columns columns = columns_of(thread, hidden);
    GateSums* sums = reinterpret_cast<GateSums*>(thread.shared);
    if constexpr (kPhase == 0) {
      const Four key = origin.window(s, row, 0, columns.first, 0);
      const Four query = load_once(hidden_states + row * hidden + columns.first);
      const float active = columns.active ? 1.f : 0.f;
      float* out = columns.part < 0 ? nullptr : &sums[columns.part].key_square;
      thread.sum(dot(key, key) * active, out);
      thread.sum(dot(query * load(layer.norm_weight + columns.first), key) * active, out ? out + 1 : nullptr);
      thread.sum(dot(query, query) * active, out ? out + 2 : nullptr);
    } else {
      const float gate = gate_of_parts(sums, parts, hidden, layer.eps).gate;
      if (thread.index == 0) gates[row] = gate;
      if (!columns.active) return;
      const Four own = origin.window(s, row, 1, columns.first, 0) * (s.exists && !s.exists[0] ? 0.f : gate);
      if (kept_count) store(kept + row * hidden + columns.first, own);
      Four out = own;
      if (layer.conv_weight) {
        Four sum = filled(0.f);
        GENGRAM_KEEP_LOOP for (int64_t tap = 0; tap < layer.taps; tap++) {
          const int64_t offset = tap * layer.dilation - layer.reach_back;
          if (!is_in_segment(s, 0, offset)) continue;
          Four input = own;
          if (offset < 0)
            input = history ? load(history + (row * layer.reach_back + layer.reach_back + offset) * hidden + columns.first) : filled(0.f);
          sum = add_product(sum, input, load(layer.conv_weight + tap * hidden + columns.first));
        }
        GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] += sum.x[i] * sigmoid_of(sum.x[i]);
      }
      store_once(residual + row * hidden + columns.first, out);
    }
  }
};

// ---- backward: gate, value and convolution

// Writes the values of all positions, (batch, length, hidden).
template <class Origin>
struct ValueRowsKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 2, kPhases = 2;
  Origin origin;
  Tokens tokens;
  float* values;
  int64_t hidden, tiles;

  struct Sink {
    float* out;
    int64_t hidden;
    bool active;
    GENGRAM_THREAD void one(int64_t t, const Four& value) const {
      if (active) store(out + t * hidden, value);
    }
    GENGRAM_THREAD void eight(int64_t t, const Four (&values)[kGroup]) const {
      GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) one(t + p, values[p]);
    }
  };

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x / tiles, first = thread.x % tiles * kTile;
    const int count = int(smaller(kTile, tokens.length - first));
    const Sequence s = sequence_of(tokens, row);
    if constexpr (kPhase == 0) {
      origin.prepare(thread, s, first, count);
    } else {
      const Columns columns = columns_of(thread, hidden);
      Sink sink{values + row * s.length * hidden + columns.first, hidden, columns.active};
      origin.sweep(thread, s, row, 1, columns.first, first, count, sink);
    }
  }
};

// A tile of positions of the kernels below, and what they read.
template <class V, class X>
struct GatedTile {
  Tokens tokens;
  Layer layer;
  const V* values;          // (batch, length, hidden)
  const X* grad_residual;   // (batch, length, hidden)
  const float* gates;       // (batch, length)
  float* grad_taps;         // (batch, length, hidden): gradient of the convolution's result
  int64_t tiles;

  GENGRAM_THREAD int64_t row(int64_t x) const { return x / tiles; }
  GENGRAM_THREAD int64_t first(int64_t x) const { return x % tiles * kTile; }
  GENGRAM_THREAD int64_t stop(int64_t x) const { return smaller(first(x) + kTile, tokens.length); }
  GENGRAM_THREAD int64_t offset(int64_t tap) const { return tap * layer.dilation - layer.reach_back; }
  GENGRAM_THREAD int64_t at(int64_t row, int64_t t, int64_t column) const { return (row * tokens.length + t) * layer.hidden + column; }
  // Inputs of the convolution at taps `tap` .. tap + kTapsAtOnce - 1 of position t, 0 where one does not count.
  GENGRAM_THREAD void inputs(const Sequence& s, int64_t row, int64_t t, int64_t tap, int64_t column, Four (&out)[kTapsAtOnce]) const {
    float strength[kTapsAtOnce];
    bool counts[kTapsAtOnce];
    GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++) {  // all loads first
      const int64_t other = t + offset(tap + i);
      counts[i] = tap + i < layer.taps && other >= 0 && other < s.length && is_in_segment(s, t, offset(tap + i));
      out[i] = load(values + at(row, counts[i] ? other : t, column));
      strength[i] = counts[i] ? strength_of(s, gates + row * s.length, other) : 0.f;
    }
    GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++) out[i] = counts[i] ? out[i] * strength[i] : filled(0.f);
  }
};

template <class V, class X>
struct TapGradientsKernel : GatedTile<V, X> {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const Columns columns = columns_of(thread, this->layer.hidden);
    if (!columns.active) return;
    const int64_t row = this->row(thread.x);
    const Sequence s = sequence_of(this->tokens, row);
    for (int64_t t = this->first(thread.x); t < this->stop(thread.x); t++) {
      Four sum = filled(0.f);
      GENGRAM_KEEP_LOOP for (int64_t tap = 0; tap < this->layer.taps; tap += kTapsAtOnce) {
        Four inputs[kTapsAtOnce];
        this->inputs(s, row, t, tap, columns.first, inputs);
        GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++)
          if (tap + i < this->layer.taps)
            sum = add_product(sum, inputs[i], load(this->layer.conv_weight + (tap + i) * this->layer.hidden + columns.first));
      }
      const int64_t place = this->at(row, t, columns.first);
      const Four grad = load(this->grad_residual + place);
      GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) {
        const float sigma = sigmoid_of(sum.x[i]);
        sum.x[i] = grad.x[i] * sigma * (1.f + sum.x[i] * (1.f - sigma));
      }
      store(this->grad_taps + place, sum);
    }
  }
};

// Gradients of the values, and per position and warp the sum of (gradient of u) * value: (batch, length, parts).
template <class V, class X>
struct ValueGradientsKernel : GatedTile<V, X> {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  float *grad_values, *products;
  int64_t parts;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const Columns columns = columns_of(thread, this->layer.hidden);
    const int64_t row = this->row(thread.x);
    const Sequence s = sequence_of(this->tokens, row);
    for (int64_t t = this->first(thread.x); t < this->stop(thread.x); t++) {
      const int64_t place = this->at(row, t, columns.first);
      const Four value = load(this->values + place);
      Four grad = load(this->grad_residual + place);
      GENGRAM_KEEP_LOOP for (int64_t begin = 0; this->layer.conv_weight && begin < this->layer.taps; begin += kTapsAtOnce) {
        Four grads[kTapsAtOnce], weights[kTapsAtOnce];
        bool counts[kTapsAtOnce];
        GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++) {  // all loads first
          const int64_t tap = smaller(begin + i, this->layer.taps - 1), reader = t - this->offset(tap);
          counts[i] = tap == begin + i && reader >= 0 && reader < s.length && is_in_segment(s, reader, this->offset(tap));
          grads[i] = load(this->grad_taps + this->at(row, counts[i] ? reader : t, columns.first));
          weights[i] = load(this->layer.conv_weight + tap * this->layer.hidden + columns.first);
        }
        GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++)
          if (counts[i]) grad = add_product(grad, grads[i], weights[i]);
      }
      const float product = dot(grad, value);
      thread.sum(columns.active ? product : 0.f, columns.part < 0 ? nullptr : products + (row * s.length + t) * parts + columns.part);
      if (columns.active) store(grad_values + place, grad * strength_of(s, this->gates + row * s.length, t));
    }
  }
};

// Gradients of the taps, one sum per tile of positions: (batch * tiles, taps, hidden).
template <class V, class X>
struct ConvGradientsKernel : GatedTile<V, X> {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  float* partial;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const Columns columns = columns_of(thread, this->layer.hidden);
    if (!columns.active) return;
    const int64_t row = this->row(thread.x);
    const Sequence s = sequence_of(this->tokens, row);
    GENGRAM_KEEP_LOOP for (int64_t begin = 0; begin < this->layer.taps; begin += kTapsAtOnce) {
      Four sums[kTapsAtOnce];
      GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++) sums[i] = filled(0.f);
      for (int64_t t = this->first(thread.x); t < this->stop(thread.x); t++) {
        const Four grad = load(this->grad_taps + this->at(row, t, columns.first));
        Four inputs[kTapsAtOnce];
        this->inputs(s, row, t, begin, columns.first, inputs);
        GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++) sums[i] = add_product(sums[i], grad, inputs[i]);
      }
      GENGRAM_UNROLL for (int i = 0; i < kTapsAtOnce; i++)
        if (begin + i < this->layer.taps)
          store(partial + (thread.x * this->layer.taps + begin + i) * this->layer.hidden + columns.first, sums[i]);
    }
  }
};

// out[i] = partial[0][i] + partial[1][i] + .., in this order.
struct SumTilesKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  const float* partial;
  float* out;
  int64_t tiles, count;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t i = thread.x * thread.threads + thread.index;
    if (i >= count) return;
    float sum = 0.f;
    for (int64_t tile = 0; tile < tiles; tile++) sum += partial[tile * count + i];
    out[i] = sum;
  }
};

// From the sums of ValueGradients to the factors of the gradients of query and key, one thread per position.
struct GateGradientsKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  const float* products;   // (positions, parts)
  const Gate* gates;       // (positions,)
  const float* grad_gate;  // (positions,) or null
  const bool* exists;      // (positions,) or null
  GateGradient* factors;
  int64_t positions, parts, hidden;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t i = thread.x * thread.threads + thread.index;
    if (i >= positions) return;
    float grad = 0.f;
    for (int64_t part = 0; part < parts; part++) grad += products[i * parts + part];
    if (exists && !exists[i]) grad = 0.f;
    if (grad_gate) grad += grad_gate[i];
    factors[i] = differentiate_gate(gates[i], grad, hidden);
  }
};

// Gradients of hidden states and keys, and of the norm's weight per tile: (batch * tiles, hidden).
template <class Origin, class X>
struct KeyGradientsKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 2, kPhases = 2;
  Origin origin;
  Tokens tokens;
  const X* hidden_states;
  const float* norm_weight;
  const GateGradient* factors;
  X* grad_hidden;
  float *grad_keys, *partial;
  int64_t hidden, tiles;

  struct Sink {
    const KeyGradientsKernel& k;
    int64_t start, factor_start;  // of the sequence
    Four weight, sum;
    bool active;

    GENGRAM_THREAD GateGradient factor(int64_t t) const { return k.factors[factor_start + t]; }
    GENGRAM_THREAD Four query(int64_t t) const { return load_once(k.hidden_states + start + t * k.hidden); }

    GENGRAM_THREAD void add(int64_t t, const Four& key, const Four& query, const GateGradient& f) {
      const int64_t place = start + t * k.hidden;
      const Four scaled = weight * f.product;
      sum = add_product(sum, query * f.product, key);
      if (!active) return;
      store_once(k.grad_hidden + place, add_product(scaled * key, query, f.query));
      store(k.grad_keys + place, add_product(scaled * query, key, f.key));
    }
    GENGRAM_THREAD void one(int64_t t, const Four& key) { add(t, key, query(t), factor(t)); }
    GENGRAM_THREAD void eight(int64_t t, const Four (&keys)[kGroup]) {
      Four queries[kGroup];  // all loads before the first store
      GateGradient factors[kGroup];
      GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
        queries[p] = query(t + p);
        factors[p] = factor(t + p);
      }
      GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) add(t + p, keys[p], queries[p], factors[p]);
    }
  };

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x / tiles, first = thread.x % tiles * kTile;
    const int count = int(smaller(kTile, tokens.length - first));
    const Sequence s = sequence_of(tokens, row);
    if constexpr (kPhase == 0) {
      origin.prepare(thread, s, first, count);
    } else {
      const Columns columns = columns_of(thread, hidden);
      Sink sink{*this, row * s.length * hidden + columns.first, row * s.length, load(norm_weight + columns.first), filled(0.f), columns.active};
      origin.sweep(thread, s, row, 0, columns.first, first, count, sink);
      if (columns.active) store(partial + thread.x * hidden + columns.first, sink.sum);
    }
  }
};

// ---- backward: table rows

// Weights of the irregular windows, (batch, length, kLargestSize + 2); nothing is written for the others.
struct WeightsKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  Geometry g;
  Tokens tokens;
  float* weights;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t i = thread.x * thread.threads + thread.index;
    if (i >= tokens.batch * tokens.length) return;
    const int64_t t = i % tokens.length;
    const Sequence s = sequence_of(tokens, i / tokens.length);
    if (!is_regular(g, s, t)) irregular_weights(g, s, window_span(g, s, t), weights + i * (kLargestSize + 2));
  }
};

// How much the n-gram of size m that ends at token j adds to the window of position t, where that window is irregular.
GENGRAM_THREAD float irregular_share(const Geometry& g, const Sequence& s, const float* weights, int64_t t, int64_t j, int m, bool alone) {
  const Span span = window_span(g, s, t);
  if (j < span.begin || j >= span.stop) return 0.f;
  const int longest = longest_in_span(g, s, span, j);
  if (longest < m) return 0.f;
  const float* weight = weights + t * (kLargestSize + 2);
  return alone ? weight[m] : irregular_factor(weight, longest, m);
}

// The sum of the gradients of positions begin .. stop - 1, rows `stride` apart, each times share(position). Those without a
// share are not read.
template <class G, class Share>
GENGRAM_THREAD Four sum_of_shares(int64_t begin, int64_t stop, const G* grad, int64_t stride, const Share& share) {
  Four sum = filled(0.f);
  GENGRAM_KEEP_LOOP for (int64_t t = begin; t < stop; t += kGroup) {
    float shares[kGroup];
    GENGRAM_KEEP_LOOP for (int i = 0; i < kGroup; i++) shares[i] = t + i < stop ? share(t + i) : 0.f;
    Four grads[kGroup];  // all loads first
    GENGRAM_UNROLL for (int i = 0; i < kGroup; i++) grads[i] = shares[i] != 0.f ? load(grad + (t + i) * stride) : filled(0.f);
    GENGRAM_UNROLL for (int i = 0; i < kGroup; i++)
      if (shares[i] != 0.f) sum = add_product(sum, grads[i], shares[i]);
  }
  return sum;
}

// For every token j the sum of the gradients of the windows that hold the n-gram of size `size` which ends there, times
// `scale`: the transpose of the window sum. Windows are weighted as in the forward pass.
template <class G>
struct PoolKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 2;
  Geometry g;
  Tokens tokens;
  const float* weights;
  const G* grads;   // (batch, length), rows `stride` apart
  float* pooled;    // (batch, tokens, width)
  int64_t width, stride, tiles;
  int size;
  float scale;

  static int64_t shared_bytes(const Geometry& g, int size) { return kTile + g.window - size + 1 + kGroup; }

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x / tiles, first = thread.x % tiles * kTile, stop = smaller(first + kTile, tokens.tokens);
    const Sequence s = sequence_of(tokens, row);
    const int endings = g.window - size + 1;
    const int64_t moved = s.context + g.last;  // the window of position t ends at token moved + t
    unsigned char* kinds = thread.shared;      // of the positions from first - moved on: 0 outside, 1 full, 2 irregular
    if constexpr (kPhase == 0) {
      for (int i = thread.index; i < kTile + endings + kGroup; i += thread.threads) {
        const int64_t t = first - moved + i;
        kinds[i] = t < 0 || t >= s.length ? 0 : is_regular(g, s, t) ? 1 : 2;
      }
      return;
    }
    const Columns columns = columns_of(thread, width);
    if (!columns.active) return;
    const G* grad = grads + row * s.length * stride + columns.first;
    float* out = pooled + row * s.tokens * width + columns.first;
    auto at = [&](int64_t t, int kind) { return kind ? load(grad + t * stride) : filled(0.f); };
    GENGRAM_KEEP_LOOP for (int64_t j = first; j < stop; j += kGroup) {
      const int place = int(j - first);
      const int64_t t = j - moved;
      bool fast = endings >= kGroup && j + kGroup <= stop;
      for (int i = 0; fast && i < endings + kGroup - 1; i++) fast = kinds[place + i] != 2;
      if (fast) {  // token j + p has the windows p .. p + endings - 1: those that all eight share are added once
        Four shared = filled(0.f), head = filled(0.f), tail = filled(0.f), sums[kGroup];
        for (int i = kGroup - 1; i < endings; i++) shared = shared + at(t + i, kinds[place + i]);
        GENGRAM_UNROLL for (int p = kGroup - 1; p >= 0; p--) {
          if (p < kGroup - 1) head = head + at(t + p, kinds[place + p]);
          sums[p] = head + shared;
        }
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
          if (p) tail = tail + at(t + endings + p - 1, kinds[place + endings + p - 1]);
          store(out + (j + p) * width, (sums[p] + tail) * scale);
        }
        continue;
      }
      GENGRAM_KEEP_LOOP for (int p = 0; p < kGroup && j + p < stop; p++) {
        const Four sum = sum_of_shares(t + p, t + p + endings, grad, stride, [&](int64_t window) {
          const int kind = kinds[place + window - t];
          if (kind != 2) return float(kind);
          return irregular_share(g, s, weights + row * s.length * (kLargestSize + 2), window, j + p, size, true);
        });
        store(out + (j + p) * width, sum * scale);
      }
    }
  }
};

// The packed row that each entry adds to, `g.rows` if none. Entries (largest + 1, batch, tokens): of A by token, of B by the
// token at which a window ends, of C_1 .. C_(largest - 1) by token.
struct RowKeysKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  Geometry g;
  Tokens tokens;
  int32_t* keys;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t i = thread.x * thread.threads + thread.index, all = tokens.batch * tokens.tokens;
    if (i >= (g.largest + 1) * all) return;
    const int64_t kind = i / all, j = i % tokens.tokens;
    const Sequence s = sequence_of(tokens, i % all / tokens.tokens);
    const int64_t t = j - s.context - g.last;
    int32_t key = g.rows;
    if (kind == 0) {
      if (s.runs[j] >= g.largest) key = s.top[j];
    } else if (kind == 1) {
      if (g.largest > 1 && t >= 0 && t < s.length && is_regular(g, s, t)) key = oldest_row(g, s, t);
    } else {
      const int m = int(kind) - 1;
      bool counts = false;
      for (int64_t other = larger(t, 0); s.runs[j] >= m && other < smaller(t + g.window - m + 1, s.length); other++)
        counts = counts || !is_regular(g, s, other);
      if (counts) key = g.section[m] + s.grams[j] % g.power[m];
    }
    keys[i] = key;
  }
};

// What the entries of RowKeys add, and where.
struct RowEntries {
  Geometry g;
  Tokens tokens;
  const float *weights, *grads, *pooled;  // of one side: (batch, length, hidden) and (batch, tokens, hidden)
  float* grad_rows;                       // (slabs, rows, slab width)
  int64_t width, slab_width;              // hidden
  int side;
  float scale;

  GENGRAM_THREAD int32_t none() const { return g.rows; }
  GENGRAM_THREAD float* place(int32_t key, int64_t column) const {
    const int64_t at = side * width + column;
    return grad_rows + (at / slab_width * g.rows + key) * slab_width + at % slab_width;
  }
  GENGRAM_THREAD Four value(int64_t entry, int64_t column) const {
    const int64_t all = tokens.batch * tokens.tokens, kind = entry / all, row = entry % all / tokens.tokens, j = entry % tokens.tokens;
    if (kind == 0) return load(pooled + (row * tokens.tokens + j) * width + column);
    const Sequence s = sequence_of(tokens, row);
    const float* grad = grads + row * s.length * width + column;
    const int64_t t = j - s.context - g.last;
    if (kind == 1) return load(grad + t * width) * scale;
    const int m = int(kind) - 1;
    const Four sum = sum_of_shares(larger(t, 0), smaller(t + g.window - m + 1, s.length), grad, width, [&](int64_t window) {
      return is_regular(g, s, window) ? 0.f : irregular_share(g, s, weights + row * s.length * (kLargestSize + 2), window, j, m, false);
    });
    return sum * scale;
  }
};

// The table row that each n-gram of one size adds to; keys (batch, tokens).
struct TableKeysKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  Tokens tokens;
  int32_t* keys;
  int size, rows;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t i = thread.x * thread.threads + thread.index;
    if (i >= tokens.batch * tokens.tokens) return;
    keys[i] = tokens.runs[i] >= size ? tokens.grams[i] % rows : rows;
  }
};

struct TableEntries {
  const float* pooled;  // (batch * tokens, width)
  float* grad_rows;     // (rows, width)
  int64_t width;
  int32_t rows;

  GENGRAM_THREAD int32_t none() const { return rows; }
  GENGRAM_THREAD float* place(int32_t key, int64_t column) const { return grad_rows + key * width + column; }
  GENGRAM_THREAD Four value(int64_t entry, int64_t column) const { return load(pooled + entry * width + column); }
};

// Adds up the entries of every row, a piece of the sorted list per block. Rows whose entries lie in one piece are done;
// of the others each piece leaves its share: `heads` where the row began earlier, `tails` where it goes on.
template <class Entries>
struct ScatterKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  Entries entries;
  const int32_t* keys;   // sorted
  const int64_t* order;  // their entries
  int64_t count;
  float *heads, *tails;  // (pieces, width)

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const Columns columns = columns_of(thread, entries.width);
    if (!columns.active) return;
    const int64_t first = thread.x * kPiece, stop = smaller(first + kPiece, count), share = thread.x * entries.width + columns.first;
    int32_t key = keys[first];
    if (key == entries.none()) return;
    bool began_earlier = first > 0 && keys[first - 1] == key;
    Four sum = filled(0.f);
    GENGRAM_KEEP_LOOP for (int64_t i = first; i < stop; i++) {
      const int32_t next = keys[i];
      if (next != key) {
        store(began_earlier ? heads + share : entries.place(key, columns.first), sum);
        if (next == entries.none()) return;
        key = next;
        began_earlier = false;
        sum = filled(0.f);
      }
      sum = sum + entries.value(order[i], columns.first);
    }
    const bool goes_on = stop < count && keys[stop] == key;
    store(began_earlier ? heads + share : goes_on ? tails + share : entries.place(key, columns.first), sum);
  }
};

// Joins the shares of the rows that lie in several pieces; the block of the piece in which a row begins does it.
template <class Entries>
struct JoinKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  Entries entries;
  const int32_t* keys;
  int64_t count;
  const float *heads, *tails;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const Columns columns = columns_of(thread, entries.width);
    const int64_t first = thread.x * kPiece, stop = first + kPiece;
    if (!columns.active || stop >= count) return;
    const int32_t key = keys[stop - 1];
    if (key == entries.none() || keys[stop] != key || (first > 0 && keys[first - 1] == key)) return;
    Four sum = load(tails + thread.x * entries.width + columns.first);
    GENGRAM_KEEP_LOOP for (int64_t piece = thread.x + 1; piece * kPiece < count && keys[piece * kPiece] == key; piece++)
      sum = sum + load(heads + piece * entries.width + columns.first);
    store(entries.place(key, columns.first), sum);
  }
};

// ---- window means of the tables as they are

// The columns of the tables' means, side by side; a table has `slices` blocks. The sums of eight neighbouring windows share what all of them hold, so their order
// depends on a position's place in its group: the last bits may differ between a sequence and its pieces.
template <class T>
struct FeaturesKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  Geometry g;
  Tokens tokens;
  const T* tables[kLargestSize];
  int sizes[kLargestSize];
  T* features;  // (batch, length, tables * width)
  int64_t width, stride, tiles, slices;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(Thread thread) const {
    const int64_t which = thread.y / slices;
    thread.y %= slices;
    const Columns columns = columns_of(thread, width);
    if (!columns.active) return;
    const int size = sizes[which];
    const T* table = tables[which];
    const int64_t row = thread.x / tiles, first = thread.x % tiles * kTile, stop = smaller(first + kTile, tokens.length);
    const Sequence s = sequence_of(tokens, row);
    const int endings = g.window - size + 1, rows = g.power[size];
    T* out = features + row * s.length * stride + which * width + columns.first;
    auto at = [&](int64_t j) { return load(table + int64_t(s.grams[j] % rows) * width + columns.first); };
    GENGRAM_KEEP_LOOP for (int64_t t = first; t < stop; t += kGroup) {
      bool fast = endings >= kGroup && t + kGroup <= stop;
      for (int p = 0; fast && p < kGroup; p++) fast = is_regular(g, s, t + p);
      if (fast) {
        const int64_t oldest = window_end(g, s, t) - endings + 1;  // position t + p reads p .. p + endings - 1 from here
        Four shared = filled(0.f), head = filled(0.f), tail = filled(0.f), sums[kGroup];
        for (int i = kGroup - 1; i < endings; i++) shared = shared + at(oldest + i);
        GENGRAM_UNROLL for (int p = kGroup - 1; p >= 0; p--) {
          if (p < kGroup - 1) head = head + at(oldest + p);
          sums[p] = head + shared;
        }
        GENGRAM_UNROLL for (int p = 0; p < kGroup; p++) {
          if (p) tail = tail + at(oldest + endings + p - 1);
          store_once(out + (t + p) * stride, (sums[p] + tail) * (1.f / float(endings)));
        }
        continue;
      }
      GENGRAM_KEEP_LOOP for (int64_t p = t; p < t + kGroup && p < stop; p++) {
        const Span span = window_span(g, s, p);
        Four sum = filled(0.f);
        int count = 0;
        GENGRAM_KEEP_LOOP for (int64_t j = span.begin + size - 1; j < span.stop; j += kGroup) {
          Four rows[kGroup];  // all loads first; a row for nothing where none is wanted
          bool is_wanted[kGroup];
          GENGRAM_UNROLL for (int i = 0; i < kGroup; i++) {
            const int64_t token = smaller(j + i, span.stop - 1);
            is_wanted[i] = token == j + i && s.runs[token] >= size;
            rows[i] = at(token);
          }
          GENGRAM_UNROLL for (int i = 0; i < kGroup; i++) {
            if (!is_wanted[i]) continue;
            sum = sum + rows[i];
            count++;
          }
        }
        store_once(out + p * stride, sum * (count ? 1.f / float(count) : 0.f));
      }
    }
  }
};

// ---- rows and runs

constexpr int kPlanTokens = 8;  // of a thread

GENGRAM_THREAD int64_t last_break(const int64_t* codes, int64_t first, int64_t stop) {
  int64_t found = -1;
  for (int64_t t = first; t < stop; t++)
    if (codes[t] <= 0) found = t;
  return found;
}

// The last token that is no letter in each piece of a row, -1 if there is none: (batch, pieces).
struct BreaksKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 2;
  const int64_t* codes;
  int64_t* breaks;
  int64_t tokens, pieces;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    int64_t* found = reinterpret_cast<int64_t*>(thread.shared);
    const int64_t first = (thread.x % pieces * thread.threads + thread.index) * kPlanTokens;
    if constexpr (kPhase == 0) {
      found[thread.index] = last_break(codes + thread.x / pieces * tokens, first, smaller(first + kPlanTokens, tokens));
    } else if (thread.index == 0) {
      int64_t last = -1;
      for (int i = 0; i < thread.threads; i++) last = larger(last, found[i]);
      breaks[thread.x] = last;
    }
  }
};

// The last break before each piece, in place; one thread per row.
struct CarryBreaksKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 1;
  int64_t* breaks;
  int64_t batch, pieces;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    const int64_t row = thread.x * thread.threads + thread.index;
    if (row >= batch) return;
    int64_t last = -1;
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t here = breaks[row * pieces + i];
      breaks[row * pieces + i] = last;
      last = larger(last, here);
    }
  }
};

struct PlanKernel {
  static constexpr int kThreads = kThreadsMost, kBlocks = 1, kPhases = 2;
  const int64_t* codes;
  const int32_t* behind;
  const int64_t* breaks;
  int32_t *grams, *runs;
  int64_t tokens, pieces;
  int largest;

  template <int kPhase, class Thread>
  GENGRAM_THREAD void phase(const Thread& thread) const {
    int64_t* found = reinterpret_cast<int64_t*>(thread.shared);
    const int64_t start = thread.x / pieces * tokens;
    const int64_t first = (thread.x % pieces * thread.threads + thread.index) * kPlanTokens, stop = smaller(first + kPlanTokens, tokens);
    if constexpr (kPhase == 0) {
      found[thread.index] = last_break(codes + start, first, stop);
    } else {
      int64_t last = breaks[thread.x];
      for (int i = 0; i < thread.index; i++) last = larger(last, found[i]);
      for (int64_t t = first; t < stop; t++) {
        if (codes[start + t] <= 0) last = t;
        const int64_t reach = behind ? larger(int64_t(behind[start + t]) + 1, 0) : tokens;
        runs[start + t] = int32_t(smaller(t - last, reach));
        int32_t gram = 0;
        for (int64_t back = smaller(smaller(largest, t + 1), behind ? larger(reach, 1) : t + 1) - 1; back >= 0; back--) {
          const int64_t code = codes[start + t - back];
          gram = gram * 5 + int32_t(code > 0 ? code - 1 : 0);
        }
        grams[start + t] = gram;
      }
    }
  }
};

}  // namespace GENGRAM_CAPABILITY
}  // namespace gengram
