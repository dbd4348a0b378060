// 16-bit numbers on the host, for any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef GENGRAM_CAPABILITY
#define GENGRAM_CAPABILITY common
#endif

namespace gengram {
inline namespace GENGRAM_CAPABILITY {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint16_t half_bits(float x) {  // round to nearest even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x47800000u) return uint16_t(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: the float's adder rounds
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + (bits >> 13 & 1u);
  return uint16_t(sign | bits >> 13);
}

inline float half_value(uint16_t h) {
  uint32_t bits = uint32_t(h & 0x7fffu) << 13;
  float x;
  if ((h & 0x7c00u) == 0x7c00u) {  // infinity and NaN keep the largest exponent
    bits |= 0x7f800000u;
    memcpy(&x, &bits, 4);
  } else {
    memcpy(&x, &bits, 4);
    x *= 0x1p112f;
  }
  return h & 0x8000u ? -x : x;
}

inline uint16_t bfloat16_bits(float x) {  // round to nearest even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float bfloat16_value(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace GENGRAM_CAPABILITY
}  // namespace gengram
